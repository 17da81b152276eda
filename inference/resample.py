"""To the working grid, and logits back to labels on the scan's grid: both directions of one geometry side by side.

Trilinear both ways with half-pixel centres, ``source = (target + 0.5) * n_source / n_target - 0.5``, and edges that
replicate: never a fill value. Scans may be averaged where the working grid is coarser than theirs (anti-aliasing). The
same code makes the training set, the pseudo-labels and the container's masks.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inference.threads import Each, in_turn
from inference.volume import Array, Labels, Shape, Spacing

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

UNCLIPPED = (-np.inf, np.inf)  # HU
ABOVE_TIE = 1e-6  # HU


class Axis(NamedTuple):
    """Linear interpolation along one axis: target i is ``(1 - fraction[i]) * source[low[i]] + fraction[i] * source[high[i]]``."""

    low: Indices
    high: Indices
    fraction: Floats


def axis(source: int, target: int) -> Axis:
    """Interpolation from ``source`` to ``target`` samples that span the same length."""
    position = (np.arange(target) + 0.5) * (source / target) - 0.5
    position = np.clip(position, 0, source - 1)
    low = np.floor(position).astype(np.intp)
    return Axis(low, np.minimum(low + 1, source - 1), (position - low).astype(np.float32))


def working_shape(shape: Shape, spacing: Spacing, working_spacing: Spacing) -> Shape:
    """Voxels (z, y, x) of the working grid that covers a scan, at least one along each axis; rounded as nnU-Net does."""
    z, y, x = (
        max(1, round(old / new * count)) for count, old, new in zip(shape, spacing, working_spacing, strict=True)
    )
    return z, y, x


def working_affine(affine: Array, shape: Shape, target: Shape) -> Array:
    """Affine (index x, y, z to RAS mm) of the working grid ``target`` (z, y, x) that covers a scan of ``shape``."""
    ratio = np.array([n / m for n, m in zip(shape[::-1], target[::-1], strict=True)])
    scale = np.diag([*ratio, 1.0])
    scale[:3, 3] = (ratio - 1) / 2  # centre of the first target voxel, in source voxels
    return affine @ scale


class Taps(NamedTuple):
    """Weighted means along one axis: target i is the sum over k of ``weights[i, k] * source[samples[i, k]]``."""

    samples: Indices
    weights: Doubles


def taps(source: int, target: int) -> Taps:
    """Means from ``source`` to ``target`` samples that span the same length, under a triangle around every target.

    It reaches a sample of the coarser grid to either side: linear interpolation where that is the source's, and a mean over
    all samples of the source where it is the target's (as ``antialias`` in torch's and Pillow's linear resize, but that edges
    replicate).
    """
    reach = max(1.0, source / target)
    position = ((np.arange(target) + 0.5) * (source / target) - 0.5)[:, None]
    index = np.floor(position - reach).astype(np.intp) + 1 + np.arange(int(np.ceil(2 * reach)))
    weights = np.maximum(0, 1 - np.abs(index - position) / reach)
    weights /= weights.sum(axis=1, keepdims=True)
    return Taps(index.clip(0, source - 1), weights)


def to_working_grid(
    voxels: Array, target: Shape, clip: tuple[float, float] = UNCLIPPED, anti_aliasing: bool = False
) -> Floats:
    """A scan (z, y, x), clipped to ``clip`` HU, on the working grid: float32 in whole HU.

    Clipped first, as nnU-Net does. Whole, because the training set stores int16: so training and inference see the same
    voxels. ``anti_aliasing``: along an axis on which the working grid is the coarser one, the mean of all voxels that a
    working voxel spans, weighted by a triangle; without it only the two next to its centre count, as in nnU-Net, and the
    others' share in the noise's mean is lost.
    """
    image = _average(voxels, clip, target) if anti_aliasing else _interpolate(voxels, clip, target)
    return np.rint(image, out=image).astype(np.float32, copy=False)


def _interpolate(voxels: Array, clip: tuple[float, float], target: Shape) -> Floats:
    """Trilinear interpolation of clipped ``voxels``."""
    planes, rows, columns = (axis(n, m) for n, m in zip(voxels.shape, target, strict=True))
    out = np.empty(target, np.float32)
    for z, (low, high, fraction) in enumerate(zip(*planes, strict=True)):
        lower, upper = (np.clip(voxels[i].astype(np.float32, copy=False), *clip) for i in (low, high))
        plane = _lerp(lower, upper, fraction)
        plane = _lerp(plane[rows.low], plane[rows.high], rows.fraction[:, None])
        out[z] = _lerp(plane[:, columns.low], plane[:, columns.high], columns.fraction)
    return out


def _average(voxels: Array, clip: tuple[float, float], target: Shape) -> Doubles:
    """Means of clipped ``voxels`` by ``taps``; every slice is read once.

    In doubles and a little above (``ABOVE_TIE``): means of whole HU often lie halfway between two, and are rounded up whatever
    the order of the sums.
    """
    planes, rows, columns = (taps(n, m) for n, m in zip(voxels.shape, target, strict=True))
    out = np.full(target, ABOVE_TIE)
    for z, voxel_plane in enumerate(voxels):
        shares = np.where(planes.samples == z, planes.weights, 0).sum(axis=1)  # of this slice in every target
        targets = np.flatnonzero(shares)
        if not targets.size:
            continue
        plane = np.clip(voxel_plane.astype(np.float64), *clip)
        plane = _mean_of_rows(_mean_of_rows(plane, rows).T, columns).T
        for i in targets:
            out[i] += shares[i] * plane
    return out


def _mean_of_rows(plane: Doubles, along: Taps) -> Doubles:
    """``taps`` along the first axis of ``plane``, whose rows are contiguous afterwards."""
    out = along.weights[:, :1] * plane[along.samples[:, 0]]
    for k in range(1, along.samples.shape[1]):
        out += along.weights[:, k : k + 1] * plane[along.samples[:, k]]
    return out


def labels_to_working_grid(labels: Labels, target: Shape) -> Labels:
    """A label map (z, y, x) on the working grid: the label whose trilinearly interpolated indicator is largest."""
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=1)).astype(np.uint8)
    slabs = ((labels[z : z + 1] == present[:, None, None, None]).astype(np.float32) for z in range(len(labels)))
    return present[labels_on_grid(slabs, len(labels), target)]


def labels_on_grid(slabs: Iterable[Floats], depth: int, target: Shape, each: Each = in_turn) -> Labels:
    """Arg-max over the classes of logits that are interpolated trilinearly to the grid ``target`` (z, y, x).

    ``slabs``: consecutive (classes, n, y, x), ``depth`` slices in all; one is held at a time, so nothing of the size classes
    x scan ever exists. ``each`` paints the slices that a slab reaches. Equal to interpolating every class everywhere:
    interpolated logits are convex combinations of their corners, so where the corners agree on the largest class, so does
    all between them. Only the rest, a few per cent at the organs' borders, is interpolated.
    """
    planes = axis(depth, target[0])
    out = np.empty(target, np.uint8)
    before: Floats | None = None
    found = painted = 0
    for slab in slabs:
        reached = int(np.searchsorted(planes.high, found + slab.shape[1]))
        paint = partial(_paint, out, planes, slab, found, before)
        each(paint, range(painted, reached))
        found, painted = found + slab.shape[1], reached
        before = slab[:, -1].copy() if slab.shape[1] else before
        del slab, paint  # their memory is the next slab's
    if found != depth:
        raise ValueError(f"got {found} slices; expected {depth}")
    return out


def _paint(out: Labels, planes: Axis, slab: Floats, first: int, before: Floats | None, z: int) -> None:
    """Slice ``z`` of the labels, from a ``slab`` whose first slice is ``first`` and from the slice ``before`` it."""
    # Targets grow with z, so the lower corner is in this slab or just before it.
    low = planes.low[z] - first
    lower = before if low < 0 else slab[:, low]
    assert lower is not None
    _argmax_resized(_lerp(lower, slab[:, planes.high[z] - first], planes.fraction[z]), out[z])


def _argmax_resized(logits: Floats, out: Labels) -> None:
    """Arg-max of ``logits`` (classes, y, x) resized bilinearly to ``out`` (Y, X)."""
    winners = argmax(logits)
    if winners.shape == out.shape:
        out[...] = winners
        return
    rows, columns = axis(winners.shape[0], out.shape[0]), axis(winners.shape[1], out.shape[1])
    agreed = np.ones(winners.shape, bool)
    agreed[:-1] &= winners[:-1] == winners[1:]
    agreed[:, :-1] &= winners[:, :-1] == winners[:, 1:]
    agreed[:-1, :-1] &= winners[:-1, :-1] == winners[1:, 1:]
    out[...] = winners[rows.low][:, columns.low]
    y, x = np.nonzero(~agreed[rows.low][:, columns.low])
    top, bottom, left, right = rows.low[y], rows.high[y], columns.low[x], columns.high[x]
    upper = _lerp(logits[:, top, left], logits[:, top, right], columns.fraction[x])
    lower = _lerp(logits[:, bottom, left], logits[:, bottom, right], columns.fraction[x])
    out[y, x] = _lerp(upper, lower, rows.fraction[y]).argmax(axis=0)


def argmax(logits: Floats) -> Labels:
    """Index of the largest of ``logits`` (classes, ...) at every voxel, the first where several are equal.

    A running maximum: numpy's own arg-max over a leading axis walks memory the long way and takes ten times as long.
    """
    best = logits[0].copy()
    winners = np.zeros(best.shape, np.uint8)
    for index in range(1, len(logits)):
        np.copyto(winners, index, where=logits[index] > best)
        np.maximum(best, logits[index], out=best)
    return winners


def slices_of(slabs: Iterable[Floats]) -> Iterator[Floats]:
    """The axial slices (classes, y, x) of consecutive slabs (classes, n, y, x)."""
    for slab in slabs:
        yield from np.moveaxis(slab, 1, 0)


def _lerp(low: Array, high: Array, fraction: Floats | np.float32) -> Floats:
    """``low + fraction * (high - low)`` in float32."""
    start = low.astype(np.float32, copy=False)
    step = high - start
    step *= fraction
    step += start
    return step
