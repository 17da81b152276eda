"""How well the models of an iteration agree on a case: the paper's Equation 1."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from itertools import combinations

import numpy as np
import numpy.typing as npt

from inference.organs import ORGANS, Organ
from inference.volume import Labels

Counts = npt.NDArray[np.int64]

# Label maps are uint8.
LABELS = 256


@dataclass(frozen=True)
class Agreement:
    """Mean pairwise DSC by organ name, from 0 to 1 (paper section 2.2, Equation 1)."""

    values: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("no organ; expected the agreement of at least one")
        for name, value in self.values.items():
            if not 0 <= value <= 1:
                raise ValueError(f"agreement of {name} is {value}; expected a number from 0 to 1")

    @property
    def minimum(self) -> float:
        """The least agreement over the organs: what the paper's threshold is for."""
        return min(self.values.values())

    @property
    def weakest(self) -> str:
        """The organ that has it, the first where several have."""
        return min(self.values, key=lambda name: self.values[name])

    @property
    def mean(self) -> float:
        """Mean over the organs."""
        return math.fsum(self.values.values()) / len(self.values)


class Overlap:
    """Voxels of every organ that each pair of models shares, counted piece by piece of a volume.

    Counts add up, so no model's mask is ever needed whole.
    """

    def __init__(self, models: int, organs: Sequence[Organ] = ORGANS) -> None:
        """``models``: at least two. Raises ValueError."""
        if models < 2:
            raise ValueError(f"{models} mask{'s' * (models != 1)} to compare; expected at least two")
        self.organs = tuple(organs)
        self.pairs = tuple(combinations(range(models), 2))
        self._sizes: Counts = np.zeros((models, LABELS), np.int64)
        self._shared: Counts = np.zeros((len(self.pairs), LABELS), np.int64)

    def add(self, masks: Sequence[Labels]) -> None:
        """Count one piece: a label map per model, all of one shape. Raises ValueError."""
        if len(masks) != len(self._sizes):
            raise ValueError(f"{len(masks)} masks; expected {len(self._sizes)}, one per model")
        _check_shapes(masks)
        # Most of a scan is background to every model, and background is not compared.
        somewhere = reduce(np.bitwise_or, masks) > 0
        labels = [mask[somewhere] for mask in masks]
        for sizes, mask in zip(self._sizes, labels, strict=True):
            sizes += np.bincount(mask, minlength=LABELS)
        for shared, (first, second) in zip(self._shared, self.pairs, strict=True):
            both = labels[first][labels[first] == labels[second]]
            shared += np.bincount(both, minlength=LABELS)

    def agreement(self) -> Agreement:
        """Equation 1 over all that was counted: the whole volume, for every organ."""
        return Agreement({organ.name: self._mean_dice(organ.id) for organ in self.organs})

    def _mean_dice(self, organ: int) -> float:
        """Mean DSC of an organ over all pairs; 1 for a pair that has it nowhere, 0 where one alone has it.

        Summed as fractions: a mean of exactly 0.9 is 0.9, and the paper's threshold accepts it.
        """
        total = Fraction(0)
        for shared, (first, second) in zip(self._shared[:, organ], self.pairs, strict=True):
            size = int(self._sizes[first, organ] + self._sizes[second, organ])
            total += Fraction(2 * int(shared), size) if size else 1
        return float(total / len(self.pairs))


def pairwise_dice(masks: Sequence[Labels], organs: Sequence[Organ] = ORGANS) -> Agreement:
    """Equation 1: the mean DSC over all pairs of ``masks``, label maps (z, y, x), for each organ in the whole volume.

    An organ that both models of a pair lack counts 1, one that only one of them has 0. Raises ValueError for fewer than
    two masks or masks of different shapes.
    """
    overlap = Overlap(len(masks), organs)
    _check_shapes(masks)
    for slices in zip(*masks, strict=True):
        overlap.add(slices)
    return overlap.agreement()


def _check_shapes(masks: Sequence[Labels]) -> None:
    if len({mask.shape for mask in masks}) > 1:
        raise ValueError(f"masks of {', '.join(str(mask.shape) for mask in masks)}; expected one shape")
