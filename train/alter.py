"""``python -m train alter``: scans and their masks as a coarser scanner, or in a body of another size, would have been.

A second opinion on a network: truth stays known, and neither the voxels nor the size are those it was trained on. An
organ's place and look are the same, so what is lost is lost to the change alone.
"""

import argparse
import logging
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter1d

from inference.pipeline import InputError, find_cases
from inference.resample import labels_to_working_grid, to_working_grid, working_affine, working_shape
from inference.volume import ORIENTATION, SUFFIXES, read_labels, read_volume, write_volume
from train.evaluate import check_same_grid
from train.metrics import Spacing
from train.processes import process_pool

log = logging.getLogger(__name__)

FWHM = 2.3548  # of a Gaussian, in its standard deviations
LARGEST = 4.0  # of a change of size, either way


@dataclass(frozen=True)
class Alteration:
    """``size``: how many times as large the body is. ``spacing``: mm (z, y, x) that the scan is resampled to, None: its own.

    Where the new voxels are the larger ones, the scan is blurred first by a Gaussian as wide at half height as they are.
    Raises ValueError for a size or spacing that no scan has.
    """

    size: float = 1.0
    spacing: Spacing | None = None

    def __post_init__(self) -> None:
        if not 1 / LARGEST <= self.size <= LARGEST:
            raise ValueError(f"size {self.size:g}: must lie between {1 / LARGEST:g} and {LARGEST:g}")
        if self.spacing is not None and not all(0.3 <= s <= 20 for s in self.spacing):
            raise ValueError(f"spacing {self.spacing}: each must lie between 0.3 and 20 mm")


@dataclass(frozen=True)
class Job:
    """One scan, its mask if it has one, and where both go."""

    name: str
    scan: Path
    labels: Path | None
    images_out: Path
    labels_out: Path


def alter(job: Job, alteration: Alteration) -> str:
    """Write one altered scan, and its mask before it. Returns the case's name; VolumeError names a bad file."""
    scan = read_volume(job.scan, ORIENTATION)
    affine = scan.affine.copy()
    affine[:3] *= alteration.size  # origin too: scans of one body stay in register
    z, y, x = (s * alteration.size for s in scan.spacing)
    target = working_shape(scan.shape, (z, y, x), alteration.spacing) if alteration.spacing else scan.shape
    place = working_affine(affine, scan.shape, target)
    if job.labels:
        labels = read_labels(job.labels, ORIENTATION)
        check_same_grid(job.labels, labels, job.scan, scan)
        write_volume(job.labels_out, labels_to_working_grid(labels.voxels, target), place)
    voxels = scan.voxels.astype(np.float32)
    for axis, (old, new) in enumerate(zip(scan.shape, target, strict=True)):
        if new < old:
            voxels = gaussian_filter1d(voxels, old / new / FWHM, axis, mode="nearest")
    image = np.rint(to_working_grid(voxels, target))
    write_volume(job.images_out, image.clip(-32768, 32767).astype(np.int16), place)
    return job.name


def find_jobs(images: Path, labels: Path | None, out: Path) -> tuple[list[Job], list[str]]:
    """What is to be done for the scans of a folder, and a sentence for every scan that cannot be altered.

    Raises InputError where there is no scan at all, or where what is read would be overwritten.
    """
    for folder, name in ((images, "imagesTs"), (labels, "labelsTs")):
        if folder and (out / name).resolve() == folder.resolve():
            raise InputError(f"{folder}: would be overwritten; expected another folder for --out")
    cases, problems = find_cases(images, out / "imagesTs")
    jobs = []
    for case in cases:
        masks = [labels / f"{case.name}{suffix}" for suffix in SUFFIXES] if labels else []
        mask = next((path for path in masks if path.is_file()), None)
        if labels and mask is None:
            problems.append(f"{case.scan}: no mask of it; expected {masks[0]}")
            continue
        image_out = out / "imagesTs" / f"{case.name}_0000.nii.gz"
        jobs.append(Job(case.name, case.scan, mask, image_out, out / "labelsTs" / f"{case.name}.nii.gz"))
    return jobs, problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m train alter``."""
    parser.add_argument("images", metavar="IMAGES", type=Path, help="folder of scans, CASE_0000.nii.gz")
    parser.add_argument("--labels", metavar="DIR", type=Path, help="folder of their masks, CASE.nii.gz")
    parser.add_argument("--size", type=float, default=1.0, metavar="TIMES", help="how large the body becomes (1)")
    parser.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="mm to resample to, blurred as larger voxels would (the scan's own)",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="gets imagesTs and labelsTs")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")


def run(args: argparse.Namespace) -> int:
    """The sub-command: 0, or 1 where a case could not be altered; the others still are."""
    try:
        alteration = Alteration(args.size, tuple(args.spacing) if args.spacing else None)
        if args.jobs < 1:
            raise ValueError(f"--jobs {args.jobs}: must be at least 1")
        jobs, problems = find_jobs(args.images, args.labels, args.out)
        for folder in ("imagesTs", *(["labelsTs"] if args.labels else [])):
            (args.out / folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        log.error("%s", error)
        return 1
    for problem in problems:
        log.error("%s", problem)
    failed = len(problems)
    for done, (name, reason) in enumerate(_each(jobs, alteration, args.jobs), 1):
        failed += bool(reason)
        log.log(logging.ERROR if reason else logging.INFO, "%d of %d: %s", done, len(jobs), reason or name)
    return 1 if failed else 0


def _each(jobs: list[Job], alteration: Alteration, count: int) -> Iterator[tuple[str, str]]:
    """Name of every case, and why it failed, "" for one that did not."""
    with process_pool(count) as pool:
        names = {pool.submit(alter, job, alteration): job.name for job in jobs}
        for future in as_completed(names):
            try:
                yield future.result(), ""
            except BrokenExecutor:
                yield names[future], f"{names[future]}: its process was killed; expected enough memory, or fewer --jobs"
            except (OSError, ValueError) as error:
                yield names[future], str(error)
