"""The sliding window: where windows lie, how they are weighted, how their logits add up. As nnU-Net does it.

Windows are walked from the first slice to the last, and slices that no later window can change leave at once as a
slab: the working set is one window high, however long the scan.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import combinations, product

import numpy as np
from scipy.ndimage import gaussian_filter

from inference.resample import Floats
from inference.volume import Shape

# A window (z, y, x) of normalised intensities to its logits (classes, z, y, x).
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


@lru_cache(maxsize=4)
def gaussian_weights(patch: Shape) -> Floats:
    """Importance of a window's voxels (z, y, x): a Gaussian with a sigma of an eighth of the patch, 10 at its centre."""
    impulse = np.zeros(patch, np.float32)
    impulse[tuple(n // 2 for n in patch)] = 1
    weights = gaussian_filter(impulse, [n / 8 for n in patch], mode="constant")
    weights *= 10 / weights.max()
    # Far corners underflow to 0, and a voxel that only such a corner sees would be divided by nothing.
    floor: np.float32 = weights[weights > 0].min()
    return np.maximum(weights, floor)


def sliding_window(
    image: Floats, patch: Shape, step: float, network: Network, progress: Progress | None = None
) -> Iterator[Floats]:
    """Yield the logits of ``image`` (z, y, x) as consecutive slabs (classes, n, y, x), first slice first.

    An image smaller than the patch is padded evenly with 0 (the mean intensity after normalisation), as in training.
    ``progress(done, all)`` is called after every window.
    """
    margins = [max(0, wanted - found) for wanted, found in zip(patch, image.shape, strict=True)]
    before = [margin // 2 for margin in margins]
    padded = np.pad(image, [(low, margin - low) for low, margin in zip(before, margins, strict=True)])
    starts_z, starts_y, starts_x = (window_starts(n, p, step) for n, p in zip(padded.shape, patch, strict=True))
    inside = tuple(slice(low, low + n) for low, n in zip(before[1:], image.shape[1:], strict=True))
    first, last = before[0], before[0] + image.shape[0]

    windows = len(starts_z) * len(starts_y) * len(starts_x)
    weights = gaussian_weights(patch)
    sums: Floats | None = None
    total = np.zeros((patch[0], *padded.shape[1:]), np.float32)
    done = 0
    for z, after in zip(starts_z, [*starts_z[1:], padded.shape[0]], strict=True):
        for y, x in product(starts_y, starts_x):
            window = (slice(None), slice(y, y + patch[1]), slice(x, x + patch[2]))
            logits = network(padded[z : z + patch[0], y : y + patch[1], x : x + patch[2]])
            if sums is None:
                sums = np.zeros((len(logits), *total.shape), np.float32)
            for channel, values in zip(sums, logits, strict=True):
                channel[window] += weights * values
            total[window] += weights
            done += 1
            if progress:
                progress(done, windows)
        assert sums is not None
        settled = slice(max(first - z, 0), min(after, last) - z)
        if settled.stop > settled.start:
            yield np.divide(sums[:, settled, *inside], total[settled, *inside], dtype=np.float32)
        _advance(sums, after - z)
        _advance(total[None], after - z)


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
            # A copy to add to: an engine may reuse the array that it returns.
            total = logits.astype(np.float32) if total is None else total + logits
        assert total is not None
        return total / np.float32(len(flips))

    return mean_over_flips


def _advance(sums: Floats, slices: int) -> None:
    """Move ``sums`` (classes, z, y, x) down by ``slices``, in place, and clear the room above."""
    kept = sums.shape[1] - slices
    if kept > 0:
        sums[:, :kept] = sums[:, slices:].copy()
    sums[:, max(kept, 0) :] = 0
