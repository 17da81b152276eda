"""Write phantoms as a FLARE22 data set: labelled, unlabelled, validation and test split, and a record of every case."""

import argparse
import json
import logging
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.volume import atomic_write, write_volume
from train.phantom.artefact import Artefacts, draw_artefact
from train.phantom.body import Body, stream
from train.phantom.canvas import Grid
from train.phantom.disease import Disease, draw_disease
from train.phantom.scan import Phantom, generate
from train.phantom.tissue import AUXILIARY
from train.processes import process_pool

log = logging.getLogger(__name__)

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Split:
    """Folders and names of one part of a FLARE22 data set. ``labels`` None: the truth is not written."""

    name: str
    images: str
    labels: str | None
    stem: str
    offset: int  # of the seed: splits never share a body

    def case(self, number: int) -> str:
        """Name of a case without ``_0000`` and file type."""
        return self.stem.format(number)


LABELLED = Split("labelled", "imagesTr", "labelsTr", "FLARE22_Tr_{:04d}", 0)
UNLABELLED = Split("unlabelled", "unlabeled", None, "Case_{:05d}", 1_000_000)
TEST = Split("test", "imagesTs", "labelsTs", "FLARE22_Ts_{:04d}", 2_000_000)
VALIDATION = Split("validation", "imagesVal", "labelsVal", "FLARE22_Val_{:04d}", 3_000_000)
AUXILIARY_FOLDER = "auxiliaryTr"
ARTEFACT_EVERY = 10  # of the test's cases have a heavy artefact, METHOD's one in ten
ARTEFACT_CHANCE = 0.12  # in labelled cases with every disease, so that a network has seen them

# Distance of slices in mm and how often scanners have it.
_INCREMENTS = {
    1.0: 0.04,
    1.25: 0.05,
    1.5: 0.1,
    2.0: 0.14,
    2.5: 0.16,
    3.0: 0.17,
    4.0: 0.08,
    5.0: 0.19,
    6.0: 0.05,
    7.0: 0.02,
    8.0: 0.03,
}


@dataclass(frozen=True)
class Recipe:
    """How the cases of a data set are made.

    ``spacing`` mm (z, y, x), or ``pixel`` mm in plane with the slices that scanners have; both None: a scanner's native
    grid. ``disease`` of the labelled cases: "pancreas" as FLARE22's have it, or "all". ``orientations``: "lps", or
    "mixed" for arrays stored in any axis order and flips, with oblique headers now and then.
    """

    spacing: Spacing | None = None
    pixel: float | None = None
    auxiliary: bool = False
    disease: str = "pancreas"
    orientations: str = "lps"

    DISEASES = ("pancreas", "all")
    ORIENTATIONS = ("lps", "mixed")

    def __post_init__(self) -> None:
        if self.spacing is not None and self.pixel is not None:
            raise ValueError("a spacing fixes the pixel: give one of the two")
        lengths = (*(self.spacing or ()), *((self.pixel,) if self.pixel is not None else ()))
        if not all(0.3 <= s <= 20 for s in lengths):
            raise ValueError(f"spacing {lengths}: each must lie between 0.3 and 20 mm")
        if self.disease not in self.DISEASES:
            raise ValueError(f"disease {self.disease!r} is none of {', '.join(self.DISEASES)}")
        if self.orientations not in self.ORIENTATIONS:
            raise ValueError(f"orientations {self.orientations!r} is none of {', '.join(self.ORIENTATIONS)}")

    def record(self) -> dict[str, Any]:
        """JSON-able form of what shapes a case's bytes."""
        return {"disease": self.disease, "orientations": self.orientations}


@dataclass(frozen=True)
class Order:
    """One case to be written."""

    root: Path
    split: Split
    number: int
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Case name."""
        return self.split.case(self.number)

    def paths(self) -> dict[str, Path]:
        """Every file of the case: image, record, and labels and auxiliary where they are written."""
        out = {
            "image": self.root / self.split.images / f"{self.name}_0000.nii.gz",
            "record": self.root / "records" / f"{self.name}.json",
        }
        if self.split.labels:
            out["labels"] = self.root / self.split.labels / f"{self.name}.nii.gz"
        if self.recipe.auxiliary and self.split == LABELLED:
            out["auxiliary"] = self.root / AUXILIARY_FOLDER / f"{self.name}.nii.gz"
        return out


@dataclass(frozen=True)
class Findings:
    """What a case has: disease, artefacts, and the kind of its heavy artefact, "" for none."""

    disease: Disease
    artefacts: Artefacts
    heavy: str


def draw_findings(order: Order) -> Findings:
    """By METHOD's trap: labelled cases have disease of the pancreas alone, the others of liver, kidney and spleen too."""
    every = order.split != LABELLED or order.recipe.disease == "all"
    disease, artefacts, heavy = draw_disease(order.seed, every=every), Artefacts(), ""
    if order.split == TEST:
        spoilt = order.number % ARTEFACT_EVERY == 0
    else:
        spoilt = every and stream(order.seed, "artefact").random() < ARTEFACT_CHANCE
    if spoilt:
        artefacts, heavy = draw_artefact(order.seed, Body.draw(order.seed).half_width)
    if heavy == "metal":
        disease = replace(disease, implants=tuple(sorted({*disease.implants, "spine"})))
    return Findings(disease, artefacts, heavy)


def _extent(r: np.random.Generator, body: Body) -> tuple[str, float, float]:
    """Name, lower and upper end of a scan in mm: abdomen, with pelvis, with thorax too, cut short, or a slab."""
    kind, margin, bottom = r.random(), r.uniform(8, 45), r.uniform(-170, -95)
    share, chest, pelvis = r.random(), r.uniform(120, 190), r.uniform(-380, -290)
    slab = float(np.interp(share, (0, 0.4, 1), (28, 60, 150)))  # three in five show 6 to 15 cm
    centre = r.uniform(-280, 200)
    near, cut_top, cut_bottom = r.uniform(-60, 100), r.uniform(15, 75), r.uniform(-45, 40)
    top = body.dome_right + margin
    if kind < 0.29:
        return "abdomen", bottom, top
    if kind < 0.46:
        return "abdomen and pelvis", pelvis, top
    if kind < 0.55:
        return "thorax, abdomen and pelvis", min(pelvis, -300), min(body.dome_right + chest, 335)
    if kind < 0.59:
        return "thorax and abdomen", bottom, min(body.dome_right + chest, 335)
    if kind < 0.64:
        return "liver's top cut", bottom, body.dome_right - cut_top
    if kind < 0.69:
        return "upper abdomen", cut_bottom, top
    middle = near if kind < 0.88 else centre  # four slabs in ten lie anywhere, some of them without an organ
    return "slab", middle - slab / 2, middle + slab / 2


def _width(r: np.random.Generator, body: Body) -> tuple[float, float, float]:
    """Side of the square field of view, and its middle (y, x), mm.

    One in nine cuts the skin, one in nine is off centre, one in eight shows much air, or arms, beside the body.
    """
    around, cut, small, far = r.uniform(1.02, 1.25), r.uniform(0.78, 1.0), r.random() < 0.11, r.random() < 0.11
    extent = 2 * body.half_width * 1.04 * (cut if small else around)
    shift = r.normal(0, 18 if far else 6, 2)
    wide, more = r.random() < 0.12, r.uniform(1.1, 1.4)
    extent *= more if wide and not small else 1
    return float(np.clip(extent, 230, 500)), float(shift[0] + 10), float(shift[1])


def field_of_view(seed: int, spacing: Spacing | None, pixel: float | None = None) -> Grid:
    """A scan's extent and voxels for the body of ``seed``; ``spacing`` and ``pixel`` as in Recipe."""
    body = Body.draw(seed)
    r = stream(seed, "view")
    r.random(3)  # the couch's
    _, low, high = _extent(r, body)
    extent, y, x = _width(r, body)
    half = extent / 2
    if spacing is None and pixel is None:
        native = (float(r.choice((2.0, 2.5, 3.0, 4.0, 5.0))), extent / 512, extent / 512)
        return Grid.covering((low, y - half, x - half), (high, y + half, x + half), native)
    if spacing is None:
        assert pixel is not None
        increment = slice_increment(seed)
        if high - low > 400:  # nobody keeps 500 slices and more of a whole trunk
            increment = max(increment, 2.0)
        spacing = (increment, pixel, pixel)
    depth = min(half, body.half_depth * 1.25)  # a working grid need not hold the air around the body
    return Grid.covering((low, y - depth, x - half), (high, y + depth, x + half), spacing)


def slice_increment(seed: int) -> float:
    """Distance of slices in mm for ``seed``."""
    chances = np.array(list(_INCREMENTS.values()))
    return float(stream(seed, "slices").choice(list(_INCREMENTS), p=chances / chances.sum()))


def slice_thickness(seed: int, increment: float) -> float:
    """Thickness in mm: a third of scans is reconstructed with overlap, a few with gaps."""
    r = stream(seed, "slices")
    r.random(2)  # slice_increment's
    kind, overlap, gap = r.random(), r.uniform(1.2, 2.0), r.uniform(0.6, 0.95)
    factor = overlap if kind < 0.34 else gap if kind > 0.93 else 1.0
    return float(np.clip(increment * factor, min(increment, 0.6), max(increment, 8.0)))


def view_name(seed: int) -> str:
    """What part of the body the case of ``seed`` shows."""
    r = stream(seed, "view")
    r.random(3)
    return _extent(r, Body.draw(seed))[0]


def make(order: Order) -> Phantom:
    """The phantom of one case."""
    found = draw_findings(order)
    grid = field_of_view(order.seed, order.recipe.spacing, order.recipe.pixel)
    thickness = slice_thickness(order.seed, grid.spacing[0])
    phantom = generate(order.seed, grid, found.disease, found.artefacts, thickness)
    phantom.record.update(
        case=order.name,
        split=order.split.name,
        view=view_name(order.seed),
        heavy_artefact=found.heavy,
        recipe=order.recipe.record(),
    )
    return phantom


def affine(grid_spacing: Spacing, seed: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Index (x, y, z) to RAS mm for an LPS array, with a table position such as scanners store."""
    r = np.random.default_rng([seed, 7])
    sz, sy, sx = grid_spacing
    out = np.diag([-sx, -sy, sz, 1.0])
    out[:3, 3] = (shape[2] * sx / 2 + r.uniform(-15, 15), shape[1] * sy / 2 + r.uniform(-15, 60), r.uniform(-900, 900))
    return np.asarray(np.round(out, 6), np.float64)


@dataclass(frozen=True)
class Orientation:
    """How an LPS array (z, y, x) is stored: axes in another ``order``, some ``flipped``, the header ``turned`` (radians)."""

    order: tuple[int, int, int] = (0, 1, 2)
    flipped: tuple[bool, bool, bool] = (False, False, False)
    turned: float = 0.0

    @classmethod
    def draw(cls, seed: int) -> "Orientation":
        """Any of 48 in half of the cases, else slices as scanners store them with flips; a third is oblique by some degrees."""
        r = np.random.default_rng([seed, 11])
        order = r.permutation(3) if r.random() < 0.5 else np.arange(3)
        flips, angle = r.random(3) < 0.5, float(r.uniform(-0.2, 0.2)) if r.random() < 0.33 else 0.0
        a, b, c = (int(k) for k in order)
        return cls((a, b, c), (bool(flips[0]), bool(flips[1]), bool(flips[2])), angle)

    def array(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array (z, y, x) as it is stored, still with the file's slowest axis first."""
        flipped = array[tuple(slice(None, None, -1 if f else 1) for f in self.flipped)]
        return np.ascontiguousarray(flipped.transpose(self.order))

    def affine(self, affine: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
        """The matching affine: every voxel keeps its place but for the turn about the first voxel, as a tilted gantry's."""
        out = affine.copy()
        for axis, flip in enumerate(self.flipped):  # array axis 0 is the affine's column 2
            if flip:
                out[:, 3] += out[:, 2 - axis] * (shape[axis] - 1)
                out[:, 2 - axis] *= -1
        columns = [2 - self.order[2 - k] for k in range(3)]
        out[:, :3] = out[:, columns]
        c, s = np.cos(self.turned), np.sin(self.turned)
        turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
        out[:3, :3] = turn @ out[:3, :3]
        return np.asarray(np.round(out, 6), np.float64)

    def record(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"order": list(self.order), "flipped": list(self.flipped), "turned": self.turned}


def write_case(order: Order) -> str:
    """Make and write one case; the record comes last, so a case with a record is whole. Returns its name."""
    phantom, paths = make(order), order.paths()
    stored = Orientation.draw(order.seed) if order.recipe.orientations == "mixed" else Orientation()
    place = stored.affine(affine(phantom.spacing, order.seed, phantom.hu.shape), phantom.hu.shape)
    arrays: dict[str, NDArray[Any]] = {"image": phantom.hu, "labels": phantom.labels, "auxiliary": phantom.auxiliary}
    for key, array in arrays.items():
        if key in paths:
            write_volume(paths[key], stored.array(array), place)
    record = {**phantom.record, "orientation": stored.record()}
    atomic_write(paths["record"], (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
    return order.name


def _orders(root: Path, counts: dict[Split, int], seed: int, recipe: Recipe) -> Iterator[Order]:
    for split, count in counts.items():
        for k in range(1, count + 1):
            yield Order(root, split, k, seed * 10_000_000 + split.offset + k, recipe)


def _is_done(order: Order) -> bool:
    """Whole, and written with the same settings. A record of another seed or grid is an error, not a case to keep."""
    paths = order.paths()
    if not all(path.is_file() for path in paths.values()):
        return False
    record = json.loads(paths["record"].read_text())
    grid = field_of_view(order.seed, order.recipe.spacing, order.recipe.pixel)
    wanted = {"seed": order.seed, "shape": list(grid.shape), "recipe": order.recipe.record()}
    found = {key: record.get(key) for key in wanted}
    if found != wanted:
        raise ValueError(
            f"{paths['record']}: {found}; this command would write {wanted}: choose an empty folder or the settings of "
            "the first call"
        )
    return True


def write_dataset(
    root: Path,
    labelled: int,
    unlabelled: int,
    test: int,
    *,
    validation: int = 0,
    seed: int = 0,
    recipe: Recipe | None = None,
    jobs: int = 1,
) -> None:
    """Write a FLARE22 data set of phantoms under ``root``; whole cases from an earlier call are kept.

    ``seed`` up to 200 separates data sets; ``jobs`` processes. ``phantoms.json`` collects the records of all cases.
    ValueError when ``root`` holds cases of other settings.
    """
    recipe = recipe or Recipe()
    counts = {LABELLED: labelled, UNLABELLED: unlabelled, VALIDATION: validation, TEST: test}
    orders = list(_orders(root, counts, seed, recipe))
    for order in orders:
        for path in order.paths().values():
            path.parent.mkdir(parents=True, exist_ok=True)
    todo = [order for order in orders if not _is_done(order)]
    log.info("%d phantoms in %s: %d there already, %d to make", len(orders), root, len(orders) - len(todo), len(todo))
    for done, name in enumerate(_run(todo, jobs), 1):
        if done == len(todo) or done % max(1, min(25, len(todo) // 20)) == 0:
            log.info("%d of %d: %s", done, len(todo), name)
    records = [json.loads(order.paths()["record"].read_text()) for order in orders]
    summary: dict[str, Any] = {
        "name": "phantoms in FLARE22 layout",
        "seed": seed,
        "auxiliary_classes": AUXILIARY,
        "counts": {split.name: n for split, n in counts.items()},
        "cases": records,
    }
    atomic_write(root / "phantoms.json", (json.dumps(summary, indent=1, sort_keys=True) + "\n").encode())


def _run(orders: list[Order], jobs: int) -> Iterator[str]:
    if jobs <= 1:
        yield from map(write_case, orders)
        return
    with process_pool(jobs) as pool:
        for future in as_completed([pool.submit(write_case, order) for order in orders]):
            yield future.result()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m train phantom``."""
    parser.add_argument("out", type=Path, help="folder of the data set (created)")
    parser.add_argument("--labelled", type=int, default=8, metavar="N", help="cases of imagesTr / labelsTr (8)")
    parser.add_argument("--unlabelled", type=int, default=0, metavar="N", help="cases of unlabeled (0)")
    parser.add_argument(
        "--validation", type=int, default=0, metavar="N", help="cases of imagesVal / labelsVal, with truth (0)"
    )
    parser.add_argument("--test", type=int, default=0, metavar="N", help="cases of imagesTs / labelsTs, with truth (0)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another data set (0)")
    voxels = parser.add_mutually_exclusive_group()
    voxels.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="mm; default: 512 x 512 at 0.45-0.98 mm, slices of 2-5 mm",
    )
    voxels.add_argument(
        "--pixel", type=float, metavar="MM", help="in plane, with slices of 1-8 mm as scanners have them"
    )
    parser.add_argument(
        "--disease",
        choices=Recipe.DISEASES,
        default="pancreas",
        help="of the labelled cases: of the pancreas alone, as FLARE22's, or all (pancreas)",
    )
    parser.add_argument(
        "--orientations",
        choices=Recipe.ORIENTATIONS,
        default="lps",
        help="how arrays are stored: as scanners do, or in any axis order, flipped and oblique (lps)",
    )
    parser.add_argument(
        "--auxiliary", action="store_true", help=f"also write {AUXILIARY_FOLDER}: organs and the rest of the body"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")


def run(args: argparse.Namespace) -> int:
    """The sub-command: 0, or 1 with one line that says what was wrong."""
    counts = (args.labelled, args.unlabelled, args.test)
    if min(*counts, args.validation) < 0 or args.jobs < 1 or not 0 <= args.seed <= 200:
        log.error("counts must not be negative, --jobs at least 1, --seed between 0 and 200")
        return 1
    try:
        recipe = Recipe(
            spacing=tuple(args.spacing) if args.spacing else None,
            pixel=args.pixel,
            auxiliary=args.auxiliary,
            disease=args.disease,
            orientations=args.orientations,
        )
        write_dataset(args.out, *counts, validation=args.validation, seed=args.seed, recipe=recipe, jobs=args.jobs)
    except (OSError, ValueError) as error:
        log.error("%s", error)
        return 1
    return 0
