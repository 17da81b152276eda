"""Segment by thresholds and average positions, with no network: what a network has to beat to have learned anything.

From labelled scans two things are counted: where in the patient's box each organ lies (an atlas of probabilities), and
which HU it has (a histogram). A voxel goes to the organ with the largest product of both.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from inference.organs import CLASSES
from inference.volume import Array, Labels, Volume, VolumeError, read_labels, read_volume, write_labels
from train.config import load_config
from train.dataset import Case, DatasetError, held_out_cases, labelled_cases
from train.evaluate import check_same_grid
from train.metrics import Spacing
from train.trunk import trunk_box

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Box = tuple[slice, slice, slice]

# Cells of the atlas along each axis of the patient's box, and how far a count is spread: patients differ by centimetres.
CELLS = 48
SPREAD_CELLS = 1.0
# Soft tissue in steps of 10 HU; what lies outside counts in the first or last bin.
HU_EDGES = np.arange(-200.0, 401.0, 10.0)
SPREAD_BINS = 1.5
# Noise of a single voxel is averaged out over about this many mm before its HU is looked up.
SMOOTHING = 2.0
# An organ where none was seen is not impossible; one with an HU that none had is, against the rest of the body and of
# the world, a part of which has any HU.
RARE_PLACE = 1e-6
UNSEEN_HU = 1e-12
ANY_HU = 0.01


@dataclass(frozen=True)
class Baseline:
    """What was learned. ``prior``: (classes, z, y, x) on the cells of the patient's box. ``likelihood``: (classes, bins)."""

    prior: Floats
    likelihood: Floats

    def segment(self, scan: Array, spacing: Spacing) -> Labels:
        """Label map of a scan (z, y, x) in HU, inside orientation; ``spacing`` in mm, (z, y, x)."""
        labels = np.zeros(scan.shape, np.uint8)
        box = patient_box(scan)
        hu = _bins(_smooth(scan[box], spacing))
        z, y, x = (_cell_coordinates(size) for size in hu.shape)
        log_likelihood = np.log(self.likelihood)
        inside = labels[box]
        # Slice by slice: fourteen probabilities per voxel of a whole scan would not fit.
        for index, height in enumerate(z):
            prior = _interpolate(_interpolate(_interpolate(self.prior, 1, height), 1, y), 2, x)
            inside[index] = np.argmax(np.log(prior) + log_likelihood[:, hu[index]], axis=0)
        return labels


def count(scan: Array, labels: Labels, spacing: Spacing) -> tuple[Floats, Floats]:
    """One case's contribution: classes at the cells' centres (classes, z, y, x), voxels per HU bin (classes, bins)."""
    box = patient_box(scan)
    truth = labels[box]
    centres = np.ix_(
        *(np.minimum(((np.arange(CELLS) + 0.5) / CELLS * size).astype(int), size - 1) for size in truth.shape)
    )
    places = np.stack([truth[centres] == number for number in range(len(CLASSES))])
    bins = len(HU_EDGES) + 1
    joint = truth.astype(np.int64) * bins + _bins(_smooth(scan[box], spacing))
    hu = np.bincount(joint.ravel(), minlength=len(CLASSES) * bins)[: len(CLASSES) * bins].reshape(-1, bins)
    return places.astype(np.float32), hu.astype(np.float32)


def from_counts(places: Floats, hu: Floats) -> Baseline:
    """Counts over cases as probabilities, spread to what was almost seen."""
    prior = ndimage.gaussian_filter(places, (0, *[SPREAD_CELLS] * 3), mode="nearest") + RARE_PLACE
    likelihood = ndimage.gaussian_filter1d(hu, SPREAD_BINS, axis=1, mode="nearest")
    likelihood = likelihood / np.maximum(likelihood.sum(axis=1, keepdims=True), 1) + UNSEEN_HU
    likelihood[0] = (1 - ANY_HU) * likelihood[0] + ANY_HU / likelihood.shape[1]
    return Baseline(prior / prior.sum(axis=0), likelihood)


def patient_box(scan: Array) -> Box:
    """The box in plane around the patient's trunk, over all slices of a scan (z, y, x)."""
    rows, columns = trunk_box(scan)
    return slice(0, scan.shape[0]), rows, columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m train baseline``."""
    parser.description = "Segment a data set's test split by average positions and HU, learned from its labelled split."
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data set in FLARE22's layout")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the masks go, as CASE.nii.gz")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 if every test case was segmented, 1 if some failed, 2 if nothing could be learned or written."""
    settings = load_config().data
    try:
        training, test = labelled_cases(args.data, settings), held_out_cases(args.data, settings)
        baseline = _learn(training)
        args.out.mkdir(parents=True, exist_ok=True)
    except (DatasetError, VolumeError, ValueError) as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("%s: cannot be written (%s)", args.out, error.strerror)
        return 2
    failed = [case.id for number, case in enumerate(test, start=1) if not _predict(baseline, case, args.out, number)]
    log.info("segmented %d of %d cases into %s", len(test) - len(failed), len(test), args.out)
    return 1 if failed else 0


def _learn(cases: Sequence[Case]) -> Baseline:
    places = np.zeros((len(CLASSES), CELLS, CELLS, CELLS), np.float32)
    hu = np.zeros((len(CLASSES), len(HU_EDGES) + 1), np.float32)
    for number, case in enumerate(cases, start=1):
        scan, labels = _read_pair(case)
        for total, found in zip((places, hu), count(scan.voxels, labels.voxels, scan.spacing), strict=True):
            total += found
        log.info("learned from %s (%d/%d)", case.id, number, len(cases))
    return from_counts(places, hu)


def _read_pair(case: Case) -> tuple[Volume, Volume]:
    if case.label is None:
        raise DatasetError(f"{case.image}: no label map; expected one to learn from")
    scan, labels = read_volume(case.image), read_labels(case.label)
    check_same_grid(case.label, labels, case.image, scan)
    return scan, labels


def _predict(baseline: Baseline, case: Case, out: Path, number: int) -> bool:
    try:
        scan = read_volume(case.image)
        write_labels(out / f"{case.id}.nii.gz", baseline.segment(scan.voxels, scan.spacing), scan)
    except (VolumeError, OSError) as error:
        log.error("%s", error)
        return False
    log.info("segmented %s (%d)", case.id, number)
    return True


def _smooth(scan: Array, spacing: Spacing) -> Floats:
    smooth: Floats = ndimage.gaussian_filter(scan.astype(np.float32), [SMOOTHING / 2 / size for size in spacing])
    return smooth


def _bins(hu: Floats) -> npt.NDArray[np.intp]:
    return np.digitize(hu, HU_EDGES)


def _cell_coordinates(size: int) -> npt.NDArray[np.float64]:
    """Where voxel centres of an axis fall among the cells' centres."""
    return np.clip((np.arange(size) + 0.5) / size * CELLS - 0.5, 0, CELLS - 1)


def _interpolate(field: Floats, axis: int, at: npt.NDArray[np.float64] | np.float64) -> Floats:
    """Linear interpolation of an array along one axis, which a single position removes."""
    low = np.minimum(np.floor(at).astype(int), CELLS - 2)
    weight = np.asarray(at - low, np.float32)
    if weight.ndim:
        weight = weight.reshape([-1 if each == axis else 1 for each in range(field.ndim)])
    values: Floats = np.take(field, low, axis) * (1 - weight) + np.take(field, low + 1, axis) * weight
    return values
