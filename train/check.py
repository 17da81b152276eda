"""The submission check: would this image survive the challenge's machine? One line per demand, with the reason.

Every demand is tried alone: a run with everything allowed comes first, and each further one takes one thing away
(the network, writable inputs, room in /dev/shm, ...), so a line that fails names its own reason.
"""

import argparse
import logging
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

from inference.organs import ORGANS
from inference.volume import VolumeError, atomic_write, read_labels
from train.container import PREDICT, ContainerError, Mounts, find_engine, inspect_image, last_line
from train.efficiency import gpu_options, measure_container
from train.sampler import Gpu, Trace, find_gpu

log = logging.getLogger(__name__)

Verdict = Literal["pass", "fail", "not judged"]

NAME = re.compile(r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*")
# What dash and busybox say of what only bash knows: `predict.sh: 3: [[: not found`.
BASHISM = re.compile(
    r"predict\.sh: (?:line )?\d+:.*(?:not found|[Ss]yntax error|[Bb]ad substitution|[Ii]llegal option|unexpected)"
)
# A user without an entry in any image's /etc/passwd.
USER = "12345:12345"
# Everything allowed: what a run with one thing taken away is compared with.
GENEROUS = ("--shm-size", "8g")
MEMORY_GB = 28
OTHERS = ("FLARETs_9001.nii.gz", "FLARETs_9002.nii.gz")
FIRST_CASE, SECOND_CASE = "FLARETs_0001", "FLARETs_0002"
CHUNK = 2**20
KILLED = 137


class CheckError(ValueError):
    """Something without which nothing can be checked. The message says what was found and what was expected."""


@dataclass(frozen=True)
class Finding:
    """One line of the result."""

    demand: str
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Subject:
    """The image, how it is started, and where the check's scans and folders lie."""

    engine: tuple[str, ...]
    image: str
    folder: Path
    gpu: Gpu | None
    gpu_index: int
    limit: float
    command: tuple[str, ...] = PREDICT


@dataclass(frozen=True)
class Outcome:
    """One start: its trace, None where it had to be stopped, and the sentence that says what was wrong, None if nothing."""

    trace: Trace | None
    problem: str | None


@dataclass(frozen=True)
class Terms:
    """One demand: what is taken away from a run with everything allowed. A case's name, options, inputs, other masks."""

    demand: str
    options: tuple[str, ...] = GENEROUS
    read_only: bool = False
    others: bool = False
    case: str = FIRST_CASE


PLAIN = Terms("segments a scan")
DEMANDS = (
    Terms("no network", (*GENEROUS, "--network", "none")),
    Terms("read-only inputs", read_only=True),
    Terms("64 MB of /dev/shm", ("--shm-size", "64m")),
    Terms(f"{MEMORY_GB} GB of memory", (*GENEROUS, "-m", f"{MEMORY_GB}g")),
    Terms("another --user", (*GENEROUS, "--user", USER)),
    Terms("others' results stay", others=True),
    Terms("one case per start", case=SECOND_CASE),
)


def check_image(subject: Subject, size: bool = True) -> Iterator[Finding]:
    """All demands in order, each as soon as it is known. ``size``: also pack the image, which takes a minute per 2 GB."""
    name = check_name(subject.image)
    yield name
    try:
        facts = inspect_image(subject.engine, subject.image)
    except ContainerError as error:
        verdict: Verdict = "fail" if name.verdict == "pass" else "not judged"
        yield Finding("image is here", verdict, str(error))
        return
    yield Finding("image is here", "pass", f"{facts.get('Size', 0) / 1e6:.0f} MB unpacked")
    place = check_working_directory(subject, facts)
    yield place
    bash = check_bash(subject, facts)
    yield bash
    if bash.verdict == "fail":
        # The rest can still be judged, by what bash would have started.
        subject = replace(subject, command=("sh", "predict.sh"))
    yield from _check_runs(subject, place)
    if size:
        yield check_size(subject)


def check_name(image: str) -> Finding:
    """A team's name in lower case, with the tag latest: the organisers start NAME:latest from NAME.tar.gz."""
    name, _, tag = image.removeprefix("localhost/").partition(":")
    demand = "name"
    if name != name.lower():
        return Finding(demand, "fail", f"{name!r} has capitals; expected lower case")
    if not NAME.fullmatch(name):
        return Finding(
            demand, "fail", f"{name!r} is no plain name; expected letters, digits and single . _ - between them"
        )
    if tag not in ("", "latest"):
        return Finding(demand, "fail", f"the tag is {tag!r}; expected {name}:latest")
    return Finding(demand, "pass", f"{name}:latest")


def check_working_directory(subject: Subject, facts: dict[str, Any]) -> Finding:
    """The organisers start predict.sh by its bare name."""
    demand = "predict.sh in WORKDIR"
    folder = facts.get("Config", {}).get("WorkingDir") or ""
    if folder in ("", "/"):
        return Finding(demand, "fail", "the image sets no WORKDIR; expected the folder of predict.sh")
    if _probe(subject, "sh", "-c", "test -f predict.sh").returncode:
        return Finding(demand, "fail", f"no predict.sh in {folder}")
    return Finding(demand, "pass", f"{folder}/predict.sh")


def check_bash(subject: Subject, facts: dict[str, Any]) -> Finding:
    """The organisers' command is /bin/bash -c "sh predict.sh"."""
    done = _probe(subject, "/bin/bash", "-c", "true")
    if done.returncode == 0:
        return Finding("bash", "pass", "/bin/bash is there")
    entry = facts.get("Config", {}).get("Entrypoint")
    if entry:
        return Finding("bash", "fail", f"ENTRYPOINT {entry} takes the command as its arguments; expected none")
    return Finding("bash", "fail", f"/bin/bash does not run ({last_line(done.stderr)})")


def check_size(subject: Subject) -> Finding:
    """How large `docker save IMAGE | gzip` is: that file is what is handed in."""
    demand = "save | gzip"
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    packed = 0
    with subprocess.Popen(
        [*subject.engine, "save", subject.image], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        while chunk := process.stdout.read(CHUNK):
            packed += len(packer.compress(chunk))
    packed += len(packer.flush())
    if process.returncode:
        return Finding(demand, "fail", f"`save` ends with exit code {process.returncode}")
    return Finding(demand, "pass", f"{packed / 1e6:.1f} MB")


def judge_outputs(outputs: Path, scan: Path, case: str, before: dict[str, tuple[bytes, int]]) -> str | None:
    """What is wrong with an output folder after a start, None if nothing. ``before``: what it held, see ``snapshot``."""
    after = snapshot(outputs)
    for name, content in before.items():
        if name not in after:
            return f"{name}, another case's result, is gone"
        if after[name] != content:
            return f"{name}, another case's result, was touched"
    mask = outputs / f"{case}.nii.gz"
    if mask.name not in after:
        return f"no {mask.name} among the outputs"
    problem = judge_mask(mask, scan)
    if problem:
        return problem
    strangers = sorted(after.keys() - before.keys() - {mask.name})
    return f"{', '.join(strangers[:3])} left among the outputs; expected {mask.name} alone" if strangers else None


def judge_mask(mask: Path, scan: Path) -> str | None:
    """What is wrong with a mask file, None if nothing: the scan's grid and place, labels of the thirteen organs."""
    try:
        labels = read_labels(mask)
    except VolumeError as error:
        return str(error).replace(str(mask), mask.name)
    stored, wanted = nib.load(mask), nib.load(scan)
    if stored.shape != wanted.shape:
        return f"{mask.name} has {_size(stored.shape)} voxels; expected the scan's {_size(wanted.shape)}"
    if not np.allclose(stored.affine, wanted.affine, atol=1e-2):
        return f"{mask.name} lies elsewhere than its scan: spacing, origin or direction of their headers differ"
    highest = int(labels.voxels.max(initial=0))
    if highest > len(ORGANS):
        return f"{mask.name} holds label {highest}; expected 0 to {len(ORGANS)}"
    return None


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def write_scans(folder: Path, scan: Path | None) -> None:
    """Two cases for the check: a scan, or a phantom where none is given, and a smaller piece of it on a grid of its own."""
    first, second = (scan_path(folder, case) for case in (FIRST_CASE, SECOND_CASE))
    if scan is None:
        # numpy and scipy alone; imported here so that an own scan does not wait for it.
        from train.phantom import Recipe, write_dataset

        write_dataset(folder / "phantom", 0, 0, 1, seed=22, recipe=Recipe(spacing=(5.0, 3.0, 3.0)))
        (folder / "phantom" / "imagesTs" / "FLARE22_Ts_0001_0000.nii.gz").rename(first)
    else:
        if not scan.name.endswith(".nii.gz"):
            raise CheckError(f"{scan}: expected a scan in a .nii.gz file, as the challenge's are")
        atomic_write(first, scan.read_bytes())
    whole = nib.load(first)
    if min(whole.shape[:3]) < 8:
        raise CheckError(f"{first.name}: {_size(whole.shape)} voxels; expected a scan of at least 8 along every axis")
    nib.save(whole.slicer[2:-1, 1:, 3:], second)


def scan_path(folder: Path, case: str) -> Path:
    return folder / f"{case}_0000.nii.gz"


def line(finding: Finding) -> str:
    """One line for the terminal."""
    return f"{finding.verdict.upper():<10}  {finding.demand:<22}  {finding.reason}\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m train check``."""
    parser.description = "Check an image before it is handed in to FLARE: one line per demand, with the reason."
    parser.add_argument("image", metavar="IMAGE", help="such as organs:latest")
    parser.add_argument("--scan", type=Path, metavar="FILE", help="a scan to try it on (default: a synthetic one)")
    parser.add_argument("--no-size", action="store_true", help="do not pack the image, which takes a minute per 2 GB")
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="the GPU's number (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=600.0, metavar="S", help="seconds that a start may take (default: %(default)g)"
    )


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 if every demand is met, 1 if one is not or could not be judged, 2 if nothing could be checked."""
    try:
        engine = tuple(find_engine())
        with tempfile.TemporaryDirectory(prefix="check-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            write_scans(folder, args.scan)
            subject = Subject(engine, args.image, folder, find_gpu(args.gpu), args.gpu, args.limit)
            findings = []
            for finding in check_image(subject, not args.no_size):
                findings.append(finding)
                sys.stdout.write(line(finding))
                sys.stdout.flush()
    except (ContainerError, CheckError) as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("%s: %s", error.filename or "check", error.strerror or error)
        return 2
    bad = [finding.demand for finding in findings if finding.verdict != "pass"]
    if bad:
        log.error("%s: not ready: %s", args.image, ", ".join(bad))
    return 1 if bad else 0


def _check_runs(subject: Subject, place: Finding) -> Iterator[Finding]:
    """predict.sh under sh, then a run with everything allowed, then one for every demand."""
    shell = "plain sh"
    if place.verdict == "fail":
        reason = "no predict.sh to start"
        yield from (Finding(demand, "not judged", reason) for demand in (shell, PLAIN.demand, *_names(DEMANDS)))
        return
    syntax = _probe(subject, "sh", "-n", "predict.sh")
    plain = _start(subject, PLAIN)
    spoken = BASHISM.search(plain.trace.output if plain.trace else "")
    if syntax.returncode:
        yield Finding(shell, "fail", f"sh cannot read predict.sh ({last_line(syntax.stderr)})")
    elif spoken:
        yield Finding(shell, "fail", f"sh does not know what predict.sh says ({spoken.group()})")
    else:
        yield Finding(shell, "pass", "sh runs predict.sh")
    if plain.problem:
        broken = syntax.returncode or spoken
        yield Finding(
            PLAIN.demand, "not judged" if broken else "fail", "sh stops at predict.sh" if broken else plain.problem
        )
        reason = "it fails with everything allowed"
        yield from (Finding(demand, "not judged", reason) for demand in _names(DEMANDS))
        return
    yield Finding(PLAIN.demand, "pass", _cost(plain))
    for terms in DEMANDS:
        outcome = _start(subject, terms)
        yield Finding(terms.demand, "fail" if outcome.problem else "pass", outcome.problem or _cost(outcome))


def _start(subject: Subject, terms: Terms) -> Outcome:
    """One start on a folder with one case, under the given terms."""
    with tempfile.TemporaryDirectory(dir=subject.folder, ignore_cleanup_errors=True) as name:
        inputs, outputs = Path(name) / "inputs", Path(name) / "outputs"
        inputs.mkdir()
        outputs.mkdir()
        scan = scan_path(inputs, terms.case)
        scan.write_bytes(scan_path(subject.folder, terms.case).read_bytes())
        if terms.others:
            for other in OTHERS:
                (outputs / other).write_bytes(f"the result of {other}".encode())
        # Any user may read the inputs and write to the outputs: what is tried is the image.
        for folder, mode in ((Path(name), 0o755), (inputs, 0o777), (outputs, 0o777)):
            folder.chmod(mode)
        before = snapshot(outputs)
        options = [*terms.options, *gpu_options(subject.gpu, subject.gpu_index)]
        mounts = Mounts(inputs, outputs, terms.read_only)
        try:
            trace = measure_container(
                subject.engine, subject.image, mounts, subject.gpu, options, subject.command, subject.limit
            )
        except TimeoutError as error:
            return Outcome(None, str(error))
        problem = judge_outputs(outputs, scan_path(subject.folder, terms.case), terms.case, before)
        return Outcome(trace, _explained(trace, problem))


def _explained(trace: Trace, problem: str | None) -> str | None:
    """An exit code says more than the mask that is missing after it; another case's lost result weighs more than either."""
    if problem and "another case's" in problem:
        return problem
    if trace.exit_code == KILLED:
        return f"killed, as for memory (exit code {KILLED}): {last_line(trace.output)}"
    if trace.exit_code:
        return f"exit code {trace.exit_code}: {last_line(trace.output)}"
    return f"{problem}: {last_line(trace.output)}" if problem and problem.startswith("no ") else problem


def _cost(outcome: Outcome) -> str:
    trace = outcome.trace
    assert trace is not None
    peak = max((sample.own.ram_peak for sample in trace.samples if sample.own), default=None)
    memory = "" if peak is None else f", {peak:.0f} MB of RAM"
    return f"{trace.seconds:.1f} s{memory}"


def _probe(subject: Subject, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the image, without folders and network."""
    return subprocess.run(
        [*subject.engine, "run", "--rm", "--network", "none", subject.image, *command],
        capture_output=True,
        text=True,
        check=False,
    )


def _names(demands: Sequence[Terms]) -> list[str]:
    return [terms.demand for terms in demands]


def _size(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)
