"""Where the body is. A field of view is half air and table; windows, resampling and labels need the body alone."""

from dataclasses import dataclass

import cc3d
import numpy as np
import numpy.typing as npt

from inference.volume import Array, Spacing

# Fat is above, lung, bedding and air below.
BODY_HU = -300
# The search looks at points so many mm apart: along the body, and across it.
ALONG, ACROSS = 8.0, 4.0
# mm kept around what was found. Where it saves a window, just what the search may have missed: two points that the erosion
# took, and one in front of the first.
MARGIN, LEAST_MARGIN = 16.0, 3 * ACROSS


@dataclass(frozen=True)
class Windows:
    """The windows along one axis: ``patch`` voxels of the working grid each, ``voxel`` mm long, at ``step`` (fraction of it)."""

    patch: int
    step: float
    voxel: float

    def longest(self, length: float) -> float:
        """The most mm that take no more windows than ``length`` mm do; both grids begin and end with whole voxels."""
        beyond = max(0, round(length / self.voxel) - self.patch)
        more = int(np.ceil(beyond / (self.patch * self.step)))
        return (int(self.patch + more * self.patch * self.step) + 0.49) * self.voxel


@dataclass(frozen=True)
class Extent:
    """Where the body lies along one axis of a scan: from voxel ``first`` to before ``last``, of ``size`` voxels of ``side`` mm."""

    first: int
    last: int
    size: int
    side: float

    @property
    def least(self) -> slice:
        """The body and the least margin."""
        margin = round(LEAST_MARGIN / self.side)
        return slice(max(0, self.first - margin), min(self.size, self.last + margin))

    def span(self, windows: Windows) -> slice:
        """The body and its margin, which gives way where less of it saves a window; at least one window where the scan is that
        long: it costs nothing to show the network all that fits into one."""
        low, high = self.least.start, self.least.stop
        margin = round(MARGIN / self.side)
        wide = min(self.size, self.last + margin) - max(0, self.first - margin)
        # Where the wide margin would cost another window, what fits into those that are needed anyway.
        fitting = int(windows.longest((high - low) * self.side) / self.side)
        length = min(self.size, max(high - low, min(wide, fitting), int(windows.longest(0) / self.side)))
        # What does not fit on one side goes to the other.
        low = min(max(0, (low + high - length) // 2), self.size - length)
        return slice(low, low + length)


def find_body(voxels: Array, spacing: Spacing) -> tuple[Extent, Extent]:
    """Where the body lies along y and x of a scan (z, y, x) in HU, over all slices.

    The body is the largest piece above fat's density after an erosion, which cuts thin things off: the table's plates,
    sheets, tubes. Where there is none, it is the whole field of view.
    """
    steps = [max(1, round(length / side)) for length, side in zip((ALONG, ACROSS, ACROSS), spacing, strict=True)]
    body = _largest_piece(_eroded(voxels[:: steps[0], :: steps[1], :: steps[2]] > BODY_HU))
    extents = []
    for axis, other in ((1, (0, 2)), (2, (0, 1))):
        size = voxels.shape[axis]
        found = np.flatnonzero(np.any(body, axis=other)) * steps[axis]
        first, last = (int(found[0]), int(found[-1]) + steps[axis]) if found.size else (0, size)
        extents.append(Extent(first, last, size, spacing[axis]))
    return extents[0], extents[1]


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
