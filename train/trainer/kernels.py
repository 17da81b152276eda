"""Kernels of a network that is to become one with wider kernels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def widened(kernel: npt.NDArray[Any], shape: Sequence[int]) -> npt.NDArray[Any]:
    """A convolution's ``kernel`` (out, in, z, y, x) in the middle of zeros, of ``shape`` where that is wider by as much on both sides.

    With padding to match, as nnU-Net's networks have it, it is the same function. Anything else is returned as it is.
    """
    if kernel.ndim != 5 or len(shape) != 5 or kernel.shape[:2] != tuple(shape[:2]):
        return kernel
    margins = [wanted - found for wanted, found in zip(shape, kernel.shape, strict=True)]
    if any(margin < 0 or margin % 2 for margin in margins):
        return kernel
    return np.pad(kernel, [(margin // 2, margin // 2) for margin in margins])
