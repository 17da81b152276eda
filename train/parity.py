"""``python -m train parity``: the same weights through this core and through nnU-Net's own predictor, DSC per organ.

Both sides in float32, at the plan's step, without mirroring and post-processing; nnU-Net twice: with a plan that says
``force_separate_z: false``, which resamples as this core does, and with its default, which takes z apart for scans of long
voxels (docs/log.md tells what that costs).
"""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from inference.bundle import Bundle, BundleError, read_bundle
from inference.engine import Engine, EngineError, load_engine
from inference.pipeline import Options, Segmenter
from inference.volume import Labels, Volume, VolumeError, read_volume
from train import nnunet
from train.metrics import dice

log = logging.getLogger(__name__)

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
# What an exported network has to reach on a scan: mean and least DSC over its organs.
LEAST_MEAN, LEAST = 0.99, 0.97
# Organs below this many voxels are left out: a voxel or two would decide their DSC.
SMALLEST = 200


class ParityError(RuntimeError):
    """A network on which this core and nnU-Net's predictor differ. The message says by how much."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m train parity``."""
    parser.add_argument("scans", metavar="SCAN", type=Path, nargs="+", help="CT scans, .nii or .nii.gz")
    parser.add_argument("--weights", metavar="DIR", type=Path, default=WEIGHTS, help="bundle (weights/)")


def run(arguments: argparse.Namespace) -> int:
    """Print one table per scan; returns the exit code."""
    try:
        bundle = read_bundle(arguments.weights)
        engine = load_engine(bundle, "cpu", precision="f32")
        for path in arguments.scans:
            sys.stdout.write(_table(path, bundle, engine))
            sys.stdout.flush()
    except (BundleError, EngineError, VolumeError) as error:
        log.error("%s", error)
        return 1
    return 0


def compare(bundle: Bundle, scan: Volume, engine: Engine, separate_z: bool | None) -> dict[str, float]:
    """DSC of every organ with at least SMALLEST voxels on either side, between this core and nnU-Net's predictor.

    Scans are interpolated on both sides, whatever the plan says: nnU-Net cannot average them.
    """
    bundle = replace(bundle, plan=replace(bundle.plan, anti_aliasing=False))
    ours = Segmenter(bundle, engine, Options(postprocess=False, crop=False, fit=False)).segment(scan).labels
    return _agreement(ours, nnunet.predict(bundle, scan, engine, separate_z), bundle.plan.classes)


def check_parity(bundle: Bundle, path: Path) -> None:
    """See that a scan comes out of this core as it comes out of nnU-Net's predictor. Raises ParityError."""
    engine = load_engine(bundle, "cpu", precision="f32")
    found = compare(bundle, read_volume(path, bundle.plan.orientation), engine, separate_z=False)
    if not found:
        log.warning("parity: %s shows no organ to this network, so nothing could be compared", path.name)
        return
    mean, worst = float(np.mean(list(found.values()))), min(found, key=lambda name: found[name])
    log.info("parity with nnU-Net's predictor: DSC %.4f on average, %.4f at worst (%s)", mean, found[worst], worst)
    if mean < LEAST_MEAN or found[worst] < LEAST:
        raise ParityError(
            f"{path.name}: DSC with nnU-Net's predictor is {mean:.4f} on average and {found[worst]:.4f} for {worst}; "
            f"expected at least {LEAST_MEAN} and {LEAST}"
        )


def _agreement(ours: Labels, theirs: Labels, classes: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for index, name in enumerate(classes[1:], start=1):
        first, second = ours == index, theirs == index
        if max(np.count_nonzero(first), np.count_nonzero(second)) >= SMALLEST:
            found[name] = dice(first, second)
    return found


def _table(path: Path, bundle: Bundle, engine: Engine) -> str:
    scan = read_volume(path, bundle.plan.orientation)
    log.info("%s: %d x %d x %d voxels (z, y, x)", path, *scan.shape)
    same, default = (compare(bundle, scan, engine, separate_z) for separate_z in (False, None))
    lines = [
        f"{path.name}: DSC between this core and nnU-Net's predictor",
        f"{'':22}same resampling  nnU-Net's default",
    ]
    for name in sorted({*same, *default}, key=bundle.plan.classes.index):
        lines.append(f"{name:22}{same.get(name, np.nan):15.4f}{default.get(name, np.nan):19.4f}")
    means = [float(np.mean(list(values.values()))) if values else float("nan") for values in (same, default)]
    return "\n".join([*lines, f"{'mean':22}{means[0]:15.4f}{means[1]:19.4f}", "", ""])
