"""The fast path against the plain one: every class interpolated everywhere in float32, no window skipped, by scipy and numpy.

The plain path is written here a second time and shares nothing with inference/ but its engine and its rules.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from inference.bundle import Bundle, read_bundle
from inference.engine import Engine, load_engine
from inference.organs import CLASSES
from inference.pipeline import Segmenter
from inference.postprocess import Context, postprocess
from inference.volume import Shape, Volume, read_volume, write_volume
from train.metrics import dice
from train.phantom import generate
from train.phantom.canvas import Grid

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
# mL under which an organ is small: a voxel of its border weighs more.
SMALL = 5.0


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(WEIGHTS)


@pytest.fixture(scope="module")
def exact(bundle: Bundle) -> Engine:
    return load_engine(bundle, "cpu", precision="f32")


def resized(volume: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Trilinear with half-pixel centres and replicated edges, by scipy."""
    places = [np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1) for n, m in zip(volume.shape, shape)]
    grid = np.meshgrid(*places, indexing="ij", sparse=True)
    return ndimage.map_coordinates(volume.astype(np.float32), np.broadcast_arrays(*grid), order=1, mode="nearest")


def averaged(volume: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The mean under a triangle that reaches a sample of the coarser grid, axis by axis, edges replicated."""
    for axis, (n, m) in enumerate(zip(volume.shape, shape)):
        reach, matrix = max(1.0, n / m), np.zeros((m, n))
        for row, middle in zip(matrix, (np.arange(m) + 0.5) * n / m - 0.5):
            near = np.arange(int(middle - reach) - 1, int(middle + reach) + 2)
            np.add.at(row, near.clip(0, n - 1), np.clip(1 - np.abs(near - middle) / reach, 0, None))
        matrix /= matrix.sum(axis=1, keepdims=True)
        volume = np.moveaxis(np.tensordot(matrix, volume.astype(float), (1, axis)), 0, axis)
    return volume + 1e-6  # halves are rounded up


def windows(size: int, patch: int, step: float) -> list[int]:
    count = int(np.ceil((size - patch) / (patch * step))) + 1
    return [int(np.round(n * (size - patch) / max(1, count - 1))) for n in range(count)]


def plain_labels(bundle: Bundle, engine: Engine, scan: Volume, patch: Shape) -> np.ndarray:
    """Clip, resample, normalise, add all windows up, interpolate all classes, take the arg-max, apply the rules."""
    plan = bundle.plan
    shape = [max(1, round(old / new * n)) for n, old, new in zip(scan.shape, scan.spacing, plan.spacing)]
    intensity = plan.intensity
    clipped = np.clip(scan.voxels.astype(np.float32), intensity.clip_low, intensity.clip_high)
    on_grid = (averaged if plan.anti_aliasing else resized)(clipped, tuple(shape))
    image = (np.rint(on_grid) - intensity.mean) / intensity.std
    missing = [max(0, p - n) for n, p in zip(shape, patch)]
    image = np.pad(image, [(m // 2, m - m // 2) for m in missing]).astype(np.float32)
    bells = [np.exp(-0.5 * ((np.arange(p) - p // 2) / (p / 8)) ** 2) for p in patch]
    weights = (bells[0][:, None, None] * bells[1][:, None] * bells[2]).astype(np.float32)
    sums = np.zeros((len(plan.classes), *image.shape), np.float32)
    total = np.zeros(image.shape, np.float32)
    starts = [windows(n, p, plan.step) for n, p in zip(image.shape, patch)]
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                place = tuple(slice(at, at + p) for at, p in zip((z, y, x), patch))
                sums[:, *place] += weights * engine(image[place])
                total[place] += weights
    inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, shape))
    best = np.full(scan.shape, -np.inf, np.float32)
    labels = np.zeros(scan.shape, np.uint8)
    for index, channel in enumerate(sums):
        logits = resized((channel / total)[inside], scan.shape)
        labels[logits > best] = index
        np.maximum(best, logits, out=best)
    return postprocess(labels, Context.of(plan, scan.spacing))[0]


# Precision, and the least DSC of an organ and of a small one. "auto" is what the bundle says: the shipped one float32.
LEAST = {"auto": (0.999, 0.999), "bf16": (0.995, 0.99)}


def compare(
    bundle: Bundle, exact: Engine, scans: Sequence[Volume], precisions: Sequence[str], classes: int = 10
) -> None:
    """Assert the likeness of fast and plain labels, organ by organ.

    Both work on the body's box: what is compared is arithmetic and short cuts, not where windows lie. ``classes``: how many each
    scan's labels must show at least.
    """
    assert bundle.plan.precision == "float32"
    plain = [plain_labels_of_body(bundle, exact, scan) for scan in scans]
    for precision in precisions:
        least, least_small = LEAST[precision]
        segmenter = Segmenter(bundle, load_engine(bundle, "cpu", precision=precision))
        for scan, expected in zip(scans, plain, strict=True):
            labels = segmenter.segment(scan).labels
            for index, name in enumerate(CLASSES[1:], start=1):
                volume = (expected == index).sum() * scan.voxel_volume / 1000
                found = dice(expected == index, labels == index)
                assert found >= (least if volume >= SMALL else least_small), (precision, name, volume, found)
    assert all(len(np.unique(labels)) >= classes for labels in plain)


def plain_labels_of_body(bundle: Bundle, engine: Engine, scan: Volume) -> np.ndarray:
    """``plain_labels`` in the body's box, with the windows that were fitted to it."""
    prepared = Segmenter(bundle, engine).prepare(scan)
    plain = np.zeros(scan.shape, np.uint8)
    body = replace(scan, voxels=scan.voxels[prepared.box])
    plain[prepared.box] = plain_labels(bundle, engine, body, prepared.window)
    return plain


def test_fast_and_plain_labels_agree_on_phantoms(tmp_path: Path, bundle: Bundle, exact: Engine) -> None:
    scans = []
    for seed in (41, 42, 43):
        path = tmp_path / f"{seed}.nii.gz"
        body = generate(seed, Grid((54, 150, 200), (5.0, 2.0, 2.0), (-130.0, -150.0, -200.0)))
        write_volume(path, body.hu, np.diag([-2.0, -2.0, 5.0, 1.0]))
        scans.append(read_volume(path))
    compare(bundle, exact, scans, ("auto", "bf16"))


@pytest.mark.long
@pytest.mark.parametrize(("name", "classes"), [("TS_0001", 10), ("TS_0002", 8)])  # the slab shows seven organs
def test_fast_and_plain_labels_agree_on_a_real_scan(
    real_scans: Path, name: str, classes: int, bundle: Bundle, exact: Engine
) -> None:
    compare(bundle, exact, [read_volume(real_scans / f"{name}_0000.nii.gz")], ("auto", "bf16"), classes)
