"""The submission check on images that are broken in one way each.

They are made from ORGANS_IMAGE by CONTAINER_ENGINE, as tests/test_container.py says; without it only what needs no engine runs.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import save_nifti
from train.__main__ import main
from train.check import BASHISM, DEMANDS, SECOND_CASE, check_name, judge_mask, judge_outputs, snapshot, write_scans

IMAGE = os.environ.get("ORGANS_IMAGE", "")
ENGINE = shlex.split(os.environ.get("CONTAINER_ENGINE", "docker"))
needs_image = pytest.mark.skipif(not IMAGE, reason="no image was built: ORGANS_IMAGE is not set")
PREFIX = "organs-check"
ALL = ["name", "image is here", "predict.sh in WORKDIR", "bash", "plain sh", "segments a scan"] + [
    terms.demand for terms in DEMANDS
]

# A segmenter of Python's standard library that starts at once: the scan's header, uint8, an empty mask.
SEGMENT = r"""
import glob, gzip, struct, sys
for scan in glob.glob("/workspace/inputs/*_0000.nii.gz"):
    header = bytearray(gzip.open(scan).read()[:352])
    x, y, z = struct.unpack_from("<3h", header, 42)
    struct.pack_into("<2h", header, 70, 2, 8)
    struct.pack_into("<2f", header, 112, 1, 0)
    mask = scan.replace("/inputs/", "/outputs/").replace("_0000", "")
    gzip.open(mask, "wb").write(bytes(header) + bytes(x * y * z))
"""
PREDICT = "set -eu\ncd /workspace\n{}\nexec python3 segment.py\n"
# Only a host with a route takes this; not a byte is sent.
NEEDS_NETWORK = (
    "python3 -c \"import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))\""
)
# What is wrong with the image: lines of predict.sh and a command at building; the demand that fails and words of its reason.
BROKEN = {
    "bashism": ("if [[ -d inputs ]]; then :; fi || true", "", "plain sh", r"\[\[: not found"),
    "syntax": ("folders=(inputs outputs)", "", "plain sh", "cannot read predict.sh"),
    "nobash": ("", "rm /bin/bash", "bash", "/bin/bash does not run"),
    "inputs": ("touch inputs/scratch", "", "read-only inputs", "Read-only file system"),
    "network": (NEEDS_NETWORK, "", "no network", "Network is unreachable"),
    "shm": ("fallocate -l 1G /dev/shm/tensors", "", "64 MB of /dev/shm", "No space left|fallocate failed"),
    "user": ("mkdir scratch", "", "another --user", "Permission denied"),
    "others": ("find outputs -name '*.nii.gz' -exec touch {} +", "", "others' results stay", "another case's result"),
}


def engine(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*ENGINE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def build(name: str, folder: Path, lines: str = "", change: str = "") -> str:
    """An image of the project's with another predict.sh; its name."""
    context = folder / "context"
    context.mkdir()
    (context / "segment.py").write_text(SEGMENT)
    (context / "predict.sh").write_text(PREDICT.replace("{}", lines, 1))
    container, image = f"{PREFIX}-{os.getpid()}", f"{PREFIX}-{name}:latest"
    mount = ("-v", f"{context}:/context:ro")
    engine("run", "--name", container, *mount, IMAGE, "sh", "-c", f"cp /context/* /workspace/; {change}")
    try:
        engine("commit", container, image)
    finally:
        engine("rm", container)
    return image


@pytest.fixture
def built(tmp_path: Path) -> Iterator[list[str]]:
    """Names of images, which are removed after the test."""
    images: list[str] = []
    yield images
    for image in images:
        engine("rmi", image)


def checked(image: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code, and verdict and reason by demand."""
    capsys.readouterr()
    code = main(["check", image, "--no-size", "--limit", "300", *more])
    lines = [re.split(r"  +", text, maxsplit=2) for text in capsys.readouterr().out.splitlines()]
    return code, {demand: (verdict, reason) for verdict, demand, reason in lines}


@needs_image
def test_the_projects_image_passes(built: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    image = f"{PREFIX}:latest"
    engine("tag", IMAGE, image)
    built.append(image)
    code, found = checked(image, capsys)
    assert {demand: verdict for demand, (verdict, _) in found.items()} == dict.fromkeys(ALL, "PASS")
    assert code == 0


@needs_image
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_fails_for_its_reason_alone(
    name: str, built: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, change, demand, reason = BROKEN[name]
    built.append(build(name, tmp_path, lines, change))
    code, found = checked(built[0], capsys)
    assert code == 1
    assert [each for each, (verdict, _) in found.items() if verdict == "FAIL"] == [demand], found
    assert re.search(reason, found[demand][1]), found[demand]
    if name not in ("syntax", "bashism"):
        assert {verdict for verdict, _ in found.values()} == {"PASS", "FAIL"}


@needs_image
def test_an_upper_case_name_fails_and_the_rest_is_not_judged(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checked("Organs:latest", capsys)
    assert code == 1
    assert found["name"] == ("FAIL", "'Organs' has capitals; expected lower case")
    assert found["image is here"][0] == "NOT JUDGED"


@needs_image
def test_an_image_that_is_not_here_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checked("organs-nobody-built:latest", capsys)
    assert code == 1
    assert found["image is here"][0] == "FAIL"


@needs_image
def test_the_packed_size_is_that_of_save_and_gzip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], built: list[str]
) -> None:
    subprocess.run(["tar", "-C", tmp_path, "-cf", tmp_path / "root.tar", "--files-from", "/dev/null"], check=True)
    image = f"{PREFIX}-empty:latest"
    engine("import", str(tmp_path / "root.tar"), image)
    built.append(image)
    assert main(["check", image]) == 1
    size = re.search(r"PASS +save \| gzip +([\d.]+) MB", capsys.readouterr().out)
    packed = subprocess.run([*ENGINE, "save", image], capture_output=True, check=True).stdout
    assert size is not None
    assert float(size.group(1)) <= len(packed) / 1e6


@pytest.mark.parametrize("name", ["organs", "organs:latest", "localhost/organs:latest", "team-1.organs_a:latest"])
def test_names_that_the_organisers_can_start_pass(name: str) -> None:
    assert check_name(name).verdict == "pass"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Organs:latest", "capitals"),
        ("organs:cpu", "tag is 'cpu'"),
        ("registry.org/organs:latest", "no plain name"),
        ("-organs", "no plain name"),
    ],
)
def test_names_that_the_organisers_cannot_start_fail(name: str, reason: str) -> None:
    finding = check_name(name)
    assert finding.verdict == "fail"
    assert reason in finding.reason


@pytest.mark.parametrize(
    "said",
    [
        "predict.sh: 3: [[: not found",
        "predict.sh: 2: source: not found",
        'predict.sh: 4: Syntax error: "(" unexpected',
        "predict.sh: line 5: Bad substitution",
        "predict.sh: 1: set: Illegal option -o pipefail",
    ],
)
def test_what_sh_says_of_bashs_own_words_is_known(said: str) -> None:
    assert BASHISM.search(f"I 1 case\n{said}\n")


def test_a_scan_that_is_not_found_is_no_bashism() -> None:
    assert not BASHISM.search("predict.sh: neither /workspace/inputs nor /inputs is mounted\nE case: not found")


def test_two_scans_are_written_on_grids_of_their_own(tmp_path: Path) -> None:
    scan = save_nifti(tmp_path / "mine.nii.gz", np.arange(10 * 12 * 14, dtype=np.int16).reshape(10, 12, 14))
    write_scans(tmp_path, scan)
    first, second = (nib.load(path) for path in sorted(tmp_path.glob("FLARE*_0000.nii.gz")))
    assert first.shape == (14, 12, 10)
    assert second.shape == (11, 11, 7)
    assert np.array_equal(second.dataobj[0, 0, 0], first.dataobj[2, 1, 3])
    assert np.allclose(second.affine @ [0, 0, 0, 1], first.affine @ [2, 1, 3, 1])


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return save_nifti(tmp_path / f"{SECOND_CASE}_0000.nii.gz", np.zeros((4, 5, 6), np.int16))


def test_a_mask_on_the_scans_grid_is_right(tmp_path: Path, scan: Path) -> None:
    assert judge_mask(save_nifti(tmp_path / "m.nii.gz", np.full((4, 5, 6), 13, np.uint8)), scan) is None


@pytest.mark.parametrize(
    ("shape", "label", "spacing", "reason"),
    [
        ((4, 5, 5), 1, (4.0, 2.0, 2.0), "5 x 5 x 4 voxels; expected the scan's 6 x 5 x 4"),
        ((4, 5, 6), 14, (4.0, 2.0, 2.0), "label 14; expected 0 to 13"),
        ((4, 5, 6), 1, (5.0, 2.0, 2.0), "lies elsewhere"),
    ],
)
def test_a_wrong_mask_is_described(
    shape: tuple[int, int, int],
    label: int,
    spacing: tuple[float, float, float],
    reason: str,
    tmp_path: Path,
    scan: Path,
) -> None:
    mask = save_nifti(tmp_path / "m.nii.gz", np.full(shape, label, np.uint8), spacing)
    assert reason in str(judge_mask(mask, scan))


def test_half_a_mask_is_described(tmp_path: Path, scan: Path) -> None:
    rng = np.random.default_rng(1)
    mask = save_nifti(tmp_path / "m.nii.gz", rng.integers(0, 14, (4, 5, 6), np.uint8))
    mask.write_bytes(mask.read_bytes()[:150])
    assert "m.nii.gz" in str(judge_mask(mask, scan))


def test_outputs_are_right_with_the_mask_alone_beside_untouched_results(tmp_path: Path, scan: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    other = outputs / "OTHER.nii.gz"
    other.write_bytes(b"other")
    before = snapshot(outputs)
    assert judge_outputs(outputs, scan, SECOND_CASE, before) == f"no {SECOND_CASE}.nii.gz among the outputs"
    save_nifti(outputs / f"{SECOND_CASE}.nii.gz", np.zeros((4, 5, 6), np.uint8))
    assert judge_outputs(outputs, scan, SECOND_CASE, before) is None
    (outputs / "log.txt").touch()
    assert "log.txt left among the outputs" in str(judge_outputs(outputs, scan, SECOND_CASE, before))
    os.utime(other, (1, 1))
    assert judge_outputs(outputs, scan, SECOND_CASE, before) == "OTHER.nii.gz, another case's result, was touched"
    other.unlink()
    assert "is gone" in str(judge_outputs(outputs, scan, SECOND_CASE, before))
