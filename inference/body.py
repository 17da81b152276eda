"""Where the body is. A field of view is half air and table; windows, resampling and labels need the body alone."""

import cc3d
import numpy as np
import numpy.typing as npt

from inference.volume import Array, Spacing

Box = tuple[slice, slice]

# Fat is above, lung, bedding and air below.
BODY_HU = -300
# The search looks at points so many mm apart: along the body, and across it.
ALONG, ACROSS = 8.0, 4.0
# mm kept around what was found: skin, and what the search's erosion took.
MARGIN = 16.0


def body_box(voxels: Array, spacing: Spacing, least: tuple[float, float]) -> Box:
    """The rows and columns (y, x) of a scan (z, y, x) in HU that hold the body, over all slices.

    ``least``: mm (y, x) that the box has at least where the scan has them, such as a window: it costs nothing to show the
    network all that fits into one. The body is the largest piece above fat's density after an erosion, which cuts thin
    things off: the table's plates, sheets, tubes. Where there is none, the box is the whole field of view.
    """
    steps = [max(1, round(length / side)) for length, side in zip((ALONG, ACROSS, ACROSS), spacing, strict=True)]
    body = _largest_piece(_eroded(voxels[:: steps[0], :: steps[1], :: steps[2]] > BODY_HU))
    if not body.any():
        return slice(None), slice(None)
    spans = []
    for axis, other in ((1, (0, 2)), (2, (0, 1))):
        found = np.flatnonzero(np.any(body, axis=other)) * steps[axis]
        first, last = int(found[0]), int(found[-1]) + steps[axis]
        spans.append(_span(first, last, voxels.shape[axis], spacing[axis], least[axis - 1]))
    return spans[0], spans[1]


def _eroded(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Points whose neighbours in the slice, up to two to each side, are all in ``mask``; beyond the border counts as in."""
    out = mask.copy()
    for axis in (1, 2):
        before = out.copy()
        for shift in (1, 2):
            near, far = [slice(None)] * 3, [slice(None)] * 3
            near[axis], far[axis] = slice(None, -shift), slice(shift, None)
            out[tuple(near)] &= before[tuple(far)]
            out[tuple(far)] &= before[tuple(near)]
    return out


def _largest_piece(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    if not mask.any():
        return mask
    pieces = cc3d.connected_components(mask, connectivity=6)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    found: npt.NDArray[np.bool_] = pieces == sizes.argmax()
    return found


def _span(first: int, last: int, size: int, side: float, least: float) -> slice:
    """``first`` to ``last`` and a margin, at least ``least`` mm, inside the scan's ``size`` voxels of ``side`` mm."""
    margin = round(MARGIN / side)
    low, high = max(0, first - margin), min(size, last + margin)
    missing = max(0, min(size, int(np.ceil(least / side))) - (high - low))
    low, high = low - missing // 2, high + missing - missing // 2
    # What does not fit on one side goes to the other.
    low, high = low - max(0, high - size), high + max(0, -low)
    return slice(max(0, low), min(size, high))
