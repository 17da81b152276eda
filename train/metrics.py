"""DSC and NSD of one organ, by the rules of the FLARE22 organisers (JunMa11/FLARE, FLARE22/Evaluation), and their means.

NSD is DeepMind's surface-distance measure: both surfaces are cut into marching-cubes surfels between voxel centres, and
a surfel counts as overlapping when the nearest surfel of the other surface is no farther than the organ's tolerance.
The released `surface-distance` package (0.1) fails on NumPy 2 and measures distances over the whole bounding box of both
masks; here a tree of surfel positions gives the same figures, and a stray voxel far away costs nothing.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import numpy.typing as npt
from scipy.spatial import KDTree

from inference.organs import Organ

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Spacing = tuple[float, float, float]
Corner = tuple[int, int, int]

# The evaluator compares these only where the reference was labelled: annotators stopped at different heights.
LABELLED_SLICES_ONLY = ("aorta", "inferior_vena_cava", "esophagus")
# Below this DSC the evaluator does not measure surfaces: NSD is 0.
DSC_WITHOUT_SURFACE = 0.2
DIGITS = 4
BOOTSTRAP_SAMPLES = 10_000
BOOTSTRAP_SEED = 22

# The corners of a cube between eight voxel centres, in (z, y, x); a corner's place is its bit in a surfel code.
CORNERS: tuple[Corner, ...] = tuple((z, y, x) for z, y, x in product((0, 1), repeat=3))


@dataclass(frozen=True)
class Score:
    """DSC and NSD of one organ in one case, both from 0 to 1."""

    dsc: float
    nsd: float

    def __post_init__(self) -> None:
        for name, value in (("dsc", self.dsc), ("nsd", self.nsd)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; expected a number from 0 to 1")


@dataclass(frozen=True)
class Figure:
    """A mean over cases with its 95 % bootstrap interval, and the median."""

    mean: float
    low: float
    high: float
    median: float


def score(reference: Mask, prediction: Mask, spacing: Spacing, organ: Organ) -> Score:
    """DSC and NSD of one organ, rounded to four digits as the evaluator rounds.

    ``reference``, ``prediction``: (z, y, x), in the file's own index order, because the evaluator leaves out the slice
    with the highest index. ``spacing``: mm, (z, y, x), from the reference's header.
    Both empty: 1 and 1. One empty: 0 and 0. Raises ValueError if the shapes differ.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"reference is {reference.shape}, prediction {prediction.shape} (z, y, x)")
    if not reference.any() and not prediction.any():
        return Score(1.0, 1.0)
    if not reference.any() or not prediction.any():
        return Score(0.0, 0.0)
    if organ.name in LABELLED_SLICES_ONLY:
        labelled = labelled_slices(reference)
        reference, prediction = reference[labelled], prediction[labelled]
    dsc = dice(reference, prediction)
    nsd = 0.0 if dsc < DSC_WITHOUT_SURFACE else surface_dice(reference, prediction, spacing, organ.tolerance)
    return Score(_rounded(dsc), _rounded(nsd))


def summarise_values(values: Floats) -> Figure:
    """Mean, interval and median of (cases,) values, at least one.

    Percentile bootstrap over cases: the same seed each time, so the same scores give the same interval.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    # A multinomial count per case is a resample with replacement, without holding samples x cases indices.
    counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), BOOTSTRAP_SAMPLES)
    low, high = np.percentile(counts @ values / len(values), [2.5, 97.5])
    return Figure(float(values.mean()), float(low), float(high), float(np.median(values)))


def dice(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> float:
    """Dice similarity coefficient of two masks of one shape: 2 |A and B| / (|A| + |B|), 1 where both are empty."""
    total = np.count_nonzero(first) + np.count_nonzero(second)
    return 2 * np.count_nonzero(first & second) / total if total else 1.0


def surface_dice(reference: Mask, prediction: Mask, spacing: Spacing, tolerance: float) -> float:
    """Normalised surface Dice of two masks (z, y, x) at a tolerance in mm, by surfel area; 1 where both are empty."""
    table = np.array(surfel_areas(spacing))
    surfaces = [surfels(mask) for mask in (reference, prediction)]
    (points_r, codes_r), (points_p, codes_p) = surfaces
    areas_r, areas_p = table[codes_r], table[codes_p]
    total = areas_r.sum() + areas_p.sum()
    if total == 0:
        return 1.0
    overlap_r = areas_r[within(points_r, points_p, spacing, tolerance)].sum()
    overlap_p = areas_p[within(points_p, points_r, spacing, tolerance)].sum()
    return float((overlap_r + overlap_p) / total)


def labelled_slices(reference: Mask) -> slice:
    """The slices [z_min, z_max) of a mask (z, y, x) that is not empty: the evaluator leaves the last labelled slice out.

    Where that leaves nothing, because one slice is labelled, the evaluator fails; here that slice is compared.
    """
    slices = np.flatnonzero(reference.any(axis=(1, 2)))
    first, last = int(slices[0]), int(slices[-1])
    return slice(first, max(last, first + 1))


def surfels(mask: Mask) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """The surface of a mask (z, y, x): positions (n, 3) in voxels and codes (n,) of its surfels.

    A surfel sits between eight voxel centres that the mask does not hold all or none of. Its code has bit i set where
    the mask holds corner i of CORNERS. Beyond the array the mask is empty, so an organ at the border is closed there.
    """
    padded = np.pad(mask, 1).view(np.uint8)
    code = np.zeros([size + 1 for size in mask.shape], np.uint8)
    for bit, corner in enumerate(CORNERS):
        window = tuple(slice(start, start + size) for start, size in zip(corner, code.shape, strict=True))
        code |= padded[window] << np.uint8(bit)
    # Less one, inside (255) and outside (0) become 254 and 255: one comparison finds the surface.
    surface = np.flatnonzero(code - np.uint8(1) < 254)
    points = np.stack(np.unravel_index(surface, code.shape), axis=1).astype(np.int64)
    return points, code.ravel()[surface]


def within(
    points: npt.NDArray[np.int64], others: npt.NDArray[np.int64], spacing: Spacing, tolerance: float
) -> npt.NDArray[np.bool_]:
    """For each of ``points`` (n, 3), in voxels: is one of ``others`` (m, 3) at most ``tolerance`` mm away?"""
    near = np.zeros(len(points), bool)
    if not len(others):
        return near
    # Not balanced: cutting at midpoints is built faster, and voxels are even enough.
    tree = KDTree(others * np.array(spacing), balanced_tree=False, compact_nodes=False)
    # The bound is a little wider, and the distance then taken from whole voxels, because many surfels lie exactly at
    # the tolerance (2 mm is two voxels of 1 mm) and sums of rounded coordinates would decide them by chance.
    nearest = np.asarray(tree.query(points * np.array(spacing), distance_upper_bound=tolerance + 1e-3)[1])
    found = nearest < len(others)
    offsets = (points[found] - others[nearest[found]]) * np.array(spacing)
    near[found] = np.sqrt((offsets**2).sum(axis=1)) <= tolerance
    return near


@lru_cache
def surfel_areas(spacing: Spacing) -> tuple[float, ...]:
    """The area in mm2 of each of the 256 surfels that ``surfels`` codes, on voxels of ``spacing`` mm (z, y, x).

    Marching cubes: of the corners inside and those outside, the fewer fall into pieces joined along the cube's edges,
    and one polygon through the midpoints of cut edges parts each piece from the rest.
    """
    return tuple(sum(_piece_area(piece, spacing) for piece in _pieces(_minority(code))) for code in range(256))


def _minority(code: int) -> frozenset[Corner]:
    inside = frozenset(corner for bit, corner in enumerate(CORNERS) if code >> bit & 1)
    return inside if len(inside) <= 4 else frozenset(CORNERS) - inside


def _pieces(corners: frozenset[Corner]) -> list[frozenset[Corner]]:
    """Corners grouped by the cube's edges between them."""
    pieces: list[frozenset[Corner]] = []
    for corner in corners:
        touching = [piece for piece in pieces if any(_edge_axis(corner, other) is not None for other in piece)]
        pieces = [piece for piece in pieces if piece not in touching] + [frozenset({corner}).union(*touching)]
    return pieces


def _edge_axis(first: Corner, second: Corner) -> int | None:
    """The axis of the cube's edge between two corners, or None where there is no such edge."""
    axes = [axis for axis in range(3) if first[axis] != second[axis]]
    return axes[0] if len(axes) == 1 else None


def _piece_area(piece: frozenset[Corner], spacing: Spacing) -> float:
    """The area of the polygon around one piece of one to four corners.

    Its triangles face along an axis (``face``), along the diagonal of two axes (``wall``: parallel to the third) or of all
    three (``cut``: the triangle that takes one corner off, an eighth of the diagonal's area vector).
    """
    z, y, x = spacing
    face = (y * x, z * x, z * y)
    cut = 0.125 * float(np.linalg.norm(face))
    wall = [0.5 * float(np.linalg.norm([face[other] for other in range(3) if other != axis])) for axis in range(3)]
    edges = [_edge_axis(first, second) for first, second in combinations(sorted(piece), 2)]
    axes = [axis for axis in edges if axis is not None]
    flat = [axis for axis in range(3) if len({corner[axis] for corner in piece}) == 1]
    if len(piece) == 1:
        return cut
    if len(piece) == 2:
        return wall[axes[0]]
    if len(piece) == 3:
        return 0.5 * face[flat[0]] + 3 * cut
    if len(piece) == 4 and flat:
        return face[flat[0]]
    if max(sum(_edge_axis(corner, other) is not None for other in piece) for corner in piece) == 3:
        return 6 * cut
    # Four corners along three edges, one per axis: the polygon is a wall's half at either end and cuts between.
    first, last = _end_axes(piece)
    return 4 * cut + 0.5 * (wall[first] + wall[last])


def _end_axes(path: frozenset[Corner]) -> tuple[int, int]:
    """The axes of the two outer edges of a path of four corners."""
    neighbours = {
        corner: [axis for other in path if (axis := _edge_axis(corner, other)) is not None] for corner in path
    }
    first, last = (axes[0] for axes in neighbours.values() if len(axes) == 1)
    return first, last


def _rounded(value: float) -> float:
    # The evaluator rounds NumPy floats, which differ from Python's in the last of the digits where a value is half-way.
    return float(np.round(np.float64(value), DIGITS))
