"""The sliding window: where windows lie, how they are weighted, how their logits add up. As nnU-Net does it.

Windows are walked from the first slice to the last, and slices that no later window can change leave at once as a
slab: the working set is one window high, however long the scan.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product

import numpy as np
import numpy.typing as npt

from inference.resample import Floats
from inference.threads import Each, in_turn
from inference.volume import Shape

# Of a window that is fitted to the image: voxels beside the trained patch's, and the share of its work that must be saved, as
# the network is compiled anew for it and larger windows cost a few percent more per voxel.
MOST_GROWTH, LEAST_SAVING = 2.0, 0.15

# A window (z, y, x) of normalised intensities to its logits (classes, z, y, x), an array that the caller may change.
Network = Callable[[Floats], Floats]
Progress = Callable[[int, int], None]


def window_starts(size: int, patch: int, step: float) -> list[int]:
    """First voxels of the windows along one axis of ``size`` >= ``patch`` voxels.

    As few windows as ``step`` (fraction of the patch) allows, spread evenly: size 110, patch 64, step 0.5 gives 0, 23, 46.
    """
    count = int(np.ceil((size - patch) / (patch * step))) + 1
    if count == 1:
        return [0]
    stride = (size - patch) / (count - 1)
    return [int(np.round(stride * index)) for index in range(count)]


def fitted_window(shape: Shape, patch: Shape, step: float, unit: Shape, growth: float = MOST_GROWTH) -> Shape:
    """The window (z, y, x) that covers an image of ``shape`` with the least work.

    Windows overlap, and reach beyond the image, so a few larger ones can take far fewer voxels than many of the trained
    ``patch``, and a network sees more around each. They are larger by multiples of ``unit``, ``growth`` times as many voxels
    at most, as memory grows with them. The patch itself where nothing saves LEAST_SAVING of its work.
    """
    axes = [
        [
            (window, len(window_starts(max(size, window), window, step)) * window)
            for window in range(least, min(max(size, least) + more, int(growth * least) + 1), more)
        ]
        for size, least, more in zip(shape, patch, unit, strict=True)
    ]
    most = growth * math.prod(patch)
    choices = [
        (math.prod(voxels for _, voxels in choice), window)
        for choice in product(*axes)
        if math.prod(window := tuple(side for side, _ in choice)) <= most
    ]
    work, (z, y, x) = min(choices)
    return (z, y, x) if work <= (1 - LEAST_SAVING) * choices[0][0] else patch


def gaussian(patch: int) -> npt.NDArray[np.float64]:
    """Importance of a window's voxels along one axis: a Gaussian with a sigma of an eighth of the patch.

    nnU-Net's weights are the product of those along the three axes.
    """
    distance = np.arange(patch) - patch // 2
    return np.exp(-0.5 * (distance / (patch / 8)) ** 2)


def shares(starts: Sequence[int], patch: int, size: int) -> list[Floats]:
    """For every window along one axis its share of each of its voxels; the shares of a voxel add up to 1.

    Windows lie on a grid, so the share of a window is the product of its shares along the axes, and sums of logits need
    no division afterwards.
    """
    weights = gaussian(patch)
    total = np.zeros(size)
    for start in starts:
        total[start : start + patch] += weights
    return [(weights / total[start : start + patch]).astype(np.float32) for start in starts]


@dataclass(frozen=True)
class Window:
    """One window: its ``place`` (slices z, y, x) in the padded image, its ``shares`` of the voxels along each axis, and the
    voxels before and behind it within its row: ``margins`` (y, x)."""

    place: tuple[slice, slice, slice]
    shares: tuple[Floats, Floats, Floats]
    margins: tuple[tuple[int, int], tuple[int, int]]

    @property
    def weights(self) -> Floats:
        """Share of every voxel, (z, y, x)."""
        z, y, x = self.shares
        return z[:, None, None] * (y[:, None] * x)


@dataclass(frozen=True)
class Layout:
    """Where the windows of an image of ``shape`` (z, y, x) lie.

    An image smaller than the ``patch`` is padded evenly: ``before`` voxels in front, to ``padded``. ``starts``: first voxels
    of the windows along each axis, in the padded image.
    """

    shape: Shape
    patch: Shape
    before: Shape
    padded: Shape
    starts: tuple[list[int], list[int], list[int]]

    @staticmethod
    def of(shape: Shape, patch: Shape, step: float) -> "Layout":
        """The windows at ``step`` (fraction of the patch)."""
        before = tuple(max(0, wanted - found) // 2 for wanted, found in zip(patch, shape, strict=True))
        padded = tuple(max(wanted, found) for wanted, found in zip(patch, shape, strict=True))
        z, y, x = (window_starts(n, p, step) for n, p in zip(padded, patch, strict=True))
        return Layout(shape, patch, (before[0], before[1], before[2]), (padded[0], padded[1], padded[2]), (z, y, x))

    @property
    def windows(self) -> int:
        """Number of windows."""
        z, y, x = self.starts
        return len(z) * len(y) * len(x)

    @property
    def inside(self) -> tuple[slice, slice, slice]:
        """The image within the padded one."""
        z, y, x = (slice(low, low + n) for low, n in zip(self.before, self.shape, strict=True))
        return z, y, x

    def pad(self, image: Floats) -> Floats:
        """``image`` with 0 around it (the mean intensity after normalisation), as in training."""
        margins = [
            (low, wanted - low - found)
            for low, wanted, found in zip(self.before, self.padded, image.shape, strict=True)
        ]
        return np.pad(image, margins) if any(map(any, margins)) else image

    def row(self, z: int) -> Iterator[Window]:
        """The windows that start at slice ``z``."""
        along = [shares(*each) for each in zip(self.starts, self.patch, self.padded, strict=True)]
        depth = along[0][self.starts[0].index(z)]
        for (y, height), (x, width) in product(
            zip(self.starts[1], along[1], strict=True), zip(self.starts[2], along[2], strict=True)
        ):
            place = tuple(slice(at, at + n) for at, n in zip((z, y, x), self.patch, strict=True))
            margins = tuple(
                (at, size - at - n) for at, n, size in zip((y, x), self.patch[1:], self.padded[1:], strict=True)
            )
            yield Window((place[0], place[1], place[2]), (depth, height, width), (margins[0], margins[1]))


def sliding_window(
    image: Floats,
    patch: Shape,
    step: float,
    network: Network,
    progress: Progress | None = None,
    each: Each = in_turn,
) -> Iterator[Floats]:
    """Yield the logits of ``image`` (z, y, x) as consecutive slabs (classes, n, y, x), first slice first.

    A slab is valid until the next one is asked for. ``progress(done, all)`` is called after every window. ``each`` adds a
    window's slices up.
    """
    layout = Layout.of((image.shape[0], image.shape[1], image.shape[2]), patch, step)
    padded = layout.pad(image)
    carried: Floats | None = None
    done = 0
    first, last = layout.inside[0].start, layout.inside[0].stop
    for z, after in zip(layout.starts[0], [*layout.starts[0][1:], layout.padded[0]], strict=True):
        # While the network runs, memory is short: a row's sums are made after its first window, and go before the next row's.
        sums: Floats | None = None
        for window in layout.row(z):
            logits = network(padded[window.place])
            each(partial(_weigh_slice, logits, window), range(patch[0]))
            if sums is None and logits.shape[2:] == layout.padded[1:]:
                sums = logits  # the row's only window
            else:
                if sums is None:
                    sums = np.zeros((len(logits), patch[0], *layout.padded[1:]), np.float32)
                each(partial(_add_slice, sums, logits, window), range(patch[0]))
            del logits
            done += 1
            if progress:
                progress(done, layout.windows)
        assert sums is not None
        if carried is not None:
            sums[:, : carried.shape[1]] += carried
            carried = None
        settled = slice(max(first - z, 0), min(after, last) - z)
        if settled.start < settled.stop:
            yield sums[:, settled, *layout.inside[1:]]
        carried = sums[:, after - z :].copy()


def mirrored(network: Network, axes: tuple[int, ...]) -> Network:
    """Test-time mirroring: mean logits over all flips of ``axes`` (0 z, 1 y, 2 x), as in table 5 of the paper."""
    flips = [chosen for count in range(len(axes) + 1) for chosen in combinations(axes, count)]
    if len(flips) == 1:
        return network

    def mean_over_flips(window: Floats) -> Floats:
        total: Floats | None = None
        for chosen in flips:
            logits = network(np.ascontiguousarray(np.flip(window, chosen)))
            logits = np.flip(logits, tuple(axis + 1 for axis in chosen))
            total = logits if total is None else np.add(total, logits, out=total)
            del logits
        assert total is not None
        total /= np.float32(len(flips))
        return total

    return mean_over_flips


def _weigh_slice(logits: Floats, window: Window, index: int) -> None:
    """Weight one slice of a window's ``logits`` (classes, z, y, x), in place."""
    depth, height, width = window.shares
    weights = depth[index] * (height[:, None] * width)
    for values in logits[:, index]:
        values *= weights


def _add_slice(sums: Floats, logits: Floats, window: Window, index: int) -> None:
    """Add one slice of a window's weighted ``logits`` to the ``sums`` of its row, both (classes, z, y, x)."""
    for total, values in zip(sums[:, index, *window.place[1:]], logits[:, index], strict=True):
        total += values
