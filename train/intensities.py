"""HU of the organs over the labelled set: what nnU-Net clips CT to and normalises with, measured before anything is resampled.

nnU-Net clips, normalises and only then resamples; so does the container, and so the prepared files are clipped before they
are resampled. Otherwise bone, gas or contrast medium beside an organ weighs more in the voxels between the two than nnU-Net's
own predictor lets it.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from inference.bundle import read_bundle
from inference.volume import Array, Labels, atomic_write, read_labels, read_volume
from train.dataset import Case

# nnU-Net's percentiles of the foreground (Isensee et al. 2021, rule "intensity normalization").
LOWEST_PERCENT, HIGHEST_PERCENT = 0.5, 99.5
HU = np.arange(-32768, 32768)
# Where nnU-Net's fingerprint and plan hold them, by channel.
INTENSITIES = "foreground_intensity_properties_per_channel"

Shares = npt.NDArray[np.float64]


class IntensityError(ValueError):
    """Intensities that cannot be had. The message says from where, what was found and what was expected."""


def organ_shares(voxels: Array, labels: Labels) -> Shares:
    """Share of each HU of int16 among the voxels of organs; all zero where there is none."""
    found = np.clip(np.rint(voxels[labels > 0]), HU[0], HU[-1]).astype(np.int64)
    counts: Shares = np.bincount(found - HU[0], minlength=len(HU)).astype(np.float64)
    counts /= max(1.0, counts.sum())
    return counts


def shares_of_case(case: Case) -> Shares:
    """``organ_shares`` of a case on disk; all zero where its files do not fit together, which preparing it will tell."""
    assert case.label is not None
    voxels, labels = read_volume(case.image).voxels, read_labels(case.label).voxels
    return organ_shares(voxels, labels) if voxels.shape == labels.shape else np.zeros(len(HU))


def intensities(shares: Iterable[Shares]) -> dict[str, float]:
    """nnU-Net's INTENSITIES of one channel, HU; every case counts alike, as there.

    Raises IntensityError where no case has an organ.
    """
    total, cases = np.zeros(len(HU)), 0
    for share in shares:
        total += share
        cases += bool(share.any())
    if not cases:
        raise IntensityError("no labelled case shows an organ; expected at least one, to learn the range of HU from")
    total /= cases
    up_to = np.cumsum(total)
    mean = float(total @ HU)
    present = np.flatnonzero(total)

    def percentile(percent: float) -> float:
        return float(HU[np.searchsorted(up_to, percent / 100)])

    return {
        "max": float(HU[present[-1]]),
        "mean": mean,
        "median": percentile(50),
        "min": float(HU[present[0]]),
        "percentile_00_5": percentile(LOWEST_PERCENT),
        "percentile_99_5": percentile(HIGHEST_PERCENT),
        "std": float(np.sqrt(total @ (HU - mean) ** 2)),
    }


def intensities_of_training(start: Path) -> dict[str, float]:
    """What the network of ``start``, nnU-Net's checkpoint or the folder of a bundle, learned with. Raises IntensityError."""
    if start.is_dir():
        try:
            known = read_bundle(start).plan.intensity
        except (ValueError, OSError) as error:
            raise IntensityError(f"training.start_from is '{start}': {error}") from error
        return {
            "mean": known.mean,
            "percentile_00_5": known.clip_low,
            "percentile_99_5": known.clip_high,
            "std": known.std,
        }
    import torch

    if not start.is_file():
        raise IntensityError(f"training.start_from is '{start}'; expected a training's checkpoint or a bundle's folder")
    try:
        # nnU-Net stores its plan and its log beside the weights, which torch's safe loading refuses.
        plans = torch.load(start, map_location="cpu", weights_only=False)["init_args"]["plans"]
        found: dict[str, float] = plans[INTENSITIES]["0"]
    except Exception as error:
        raise IntensityError(f"{start}: cannot be read ({error}); expected nnU-Net's checkpoint") from error
    return found


def write_intensities(path: Path, found: dict[str, float]) -> None:
    """Write intensities as JSON, at once or not at all."""
    atomic_write(path, (json.dumps(found, indent=1) + "\n").encode())


def read_intensities(path: Path) -> dict[str, float]:
    """Intensities of a run. Raises IntensityError."""
    try:
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise IntensityError(
            f"{path}: cannot be read ({error}); expected the intensities of the run's organs"
        ) from error
    return found
