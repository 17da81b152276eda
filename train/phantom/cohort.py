"""Write phantoms as a FLARE22 data set: labelled, unlabelled and test split, and a record of every case."""

import argparse
import json
import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.volume import atomic_write, write_volume
from train.phantom.anatomy import Disease
from train.phantom.body import Body, stream
from train.phantom.canvas import Grid
from train.phantom.scan import Phantom, generate
from train.phantom.tissue import AUXILIARY

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
AUXILIARY_FOLDER = "auxiliaryTr"


@dataclass(frozen=True)
class Order:
    """One case to be written. ``spacing`` None: a scanner's native grid is drawn, else mm (z, y, x)."""

    root: Path
    split: Split
    number: int
    seed: int
    spacing: Spacing | None
    auxiliary: bool

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
        if self.auxiliary and self.split == LABELLED:
            out["auxiliary"] = self.root / AUXILIARY_FOLDER / f"{self.name}.nii.gz"
        return out


def draw_disease(seed: int, split: Split) -> Disease:
    """METHOD's trap: labelled cases have disease of the pancreas only, the others of liver, kidney and spleen too."""
    r = stream(seed, "disease")
    u = r.random(16)
    pancreas = Disease(
        lesions=("pancreas",) if u[0] < 0.45 else (),
        cysts=("pancreas",) if u[1] < 0.25 else (),
        missing=("gallbladder",) if u[2] < 0.06 else (),
    )
    if split.name == LABELLED.name:
        return pancreas
    lesions = [
        o
        for o, p, q in (
            ("liver", u[3], 0.4),
            ("right_kidney", u[4], 0.15),
            ("left_kidney", u[5], 0.15),
            ("spleen", u[6], 0.12),
        )
        if p < q
    ]
    cysts = [
        o
        for o, p, q in (
            ("liver", u[7], 0.2),
            ("right_kidney", u[8], 0.25),
            ("left_kidney", u[9], 0.25),
            ("spleen", u[10], 0.06),
        )
        if p < q
    ]
    missing = ["gallbladder"] if u[11] < 0.1 else []
    missing += ["left_kidney" if u[13] < 0.5 else "right_kidney"] if u[12] < 0.05 else []
    enlarged = bool(u[14] < 0.12)
    return replace(
        pancreas,
        lesions=(*pancreas.lesions, *(o for o in lesions if o not in missing)),
        cysts=(*pancreas.cysts, *(o for o in cysts if o not in missing)),
        missing=tuple(missing),
        enlarged_spleen=enlarged,
        fatty_liver=bool(u[15] < 0.2),
    )


def field_of_view(seed: int, spacing: Spacing | None) -> Grid:
    """A scan's extent and voxels for the body of ``seed``: abdomen, with pelvis, with thorax too, or a slab."""
    r = stream(seed, "view")
    body = Body.draw(seed)
    kind, top_margin, bottom, slab, centre = (
        r.random(),
        r.uniform(8, 45),
        r.uniform(-160, -95),
        r.uniform(40, 120),
        r.uniform(-60, 100),
    )
    high, low = body.dome_right + top_margin, bottom
    if kind > 0.93:
        low, high = centre - slab / 2, centre + slab / 2
    elif kind > 0.86:
        low, high = r.uniform(-380, -300), min(body.dome_right + r.uniform(120, 190), 335)
    elif kind > 0.64:
        low = r.uniform(-380, -290)
    width = 2 * body.half_width * 1.04
    extent = float(np.clip(width * (r.uniform(1.02, 1.22) if r.random() < 0.9 else r.uniform(0.92, 1.0)), 300, 450))
    x, y = r.normal(0, 6), r.normal(0, 6) + 10
    native = (float(r.choice((2.0, 2.5, 3.0, 4.0, 5.0))), extent / 512, extent / 512)
    if spacing is None:
        return Grid.covering((low, y - extent / 2, x - extent / 2), (high, y + extent / 2, x + extent / 2), native)
    half = extent / 2
    depth = min(half, body.half_depth * 1.25)  # a working grid need not hold the air around the body
    return Grid.covering((low, y - depth, x - half), (high, y + depth, x + half), spacing)


def make(order: Order) -> Phantom:
    """The phantom of one case."""
    disease = draw_disease(order.seed, order.split)
    phantom = generate(order.seed, field_of_view(order.seed, order.spacing), disease)
    phantom.record.update(case=order.name, split=order.split.name)
    return phantom


def affine(grid_spacing: Spacing, seed: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Index (x, y, z) to RAS mm for an LPS array, with a table position such as scanners store."""
    r = np.random.default_rng([seed, 7])
    sz, sy, sx = grid_spacing
    out = np.diag([-sx, -sy, sz, 1.0])
    out[:3, 3] = (shape[2] * sx / 2 + r.uniform(-15, 15), shape[1] * sy / 2 + r.uniform(-15, 60), r.uniform(-900, 900))
    return np.asarray(np.round(out, 6), np.float64)


def write_case(order: Order) -> str:
    """Make and write one case; the record comes last, so a case with a record is whole. Returns its name."""
    phantom, paths = make(order), order.paths()
    place = affine(phantom.spacing, order.seed, phantom.hu.shape)
    arrays: dict[str, NDArray[Any]] = {"image": phantom.hu, "labels": phantom.labels, "auxiliary": phantom.auxiliary}
    for key, array in arrays.items():
        if key in paths:
            write_volume(paths[key], array, place)
    text = json.dumps(phantom.record, indent=1, sort_keys=True) + "\n"
    atomic_write(paths["record"], text.encode())
    return order.name


def _orders(
    root: Path, counts: dict[Split, int], seed: int, spacing: Spacing | None, auxiliary: bool
) -> Iterator[Order]:
    for split, count in counts.items():
        for k in range(1, count + 1):
            yield Order(root, split, k, seed * 10_000_000 + split.offset + k, spacing, auxiliary)


def _is_done(order: Order) -> bool:
    """Whole, and written with the same settings. A record of another seed or grid is an error, not a case to keep."""
    paths = order.paths()
    if not all(path.is_file() for path in paths.values()):
        return False
    record = json.loads(paths["record"].read_text())
    grid = field_of_view(order.seed, order.spacing)
    if record.get("seed") != order.seed or record.get("shape") != list(grid.shape):
        raise ValueError(
            f"{paths['record']}: seed {record.get('seed')}, shape {record.get('shape')}; this command would write seed "
            f"{order.seed}, shape {list(grid.shape)}: choose an empty folder or the settings of the first call"
        )
    return True


def write_dataset(
    root: Path,
    labelled: int,
    unlabelled: int,
    test: int,
    *,
    seed: int = 0,
    spacing: Spacing | None = None,
    auxiliary: bool = False,
    jobs: int = 1,
) -> None:
    """Write a FLARE22 data set of phantoms under ``root``; whole cases from an earlier call are kept.

    ``seed`` up to 200 separates data sets; ``spacing`` as in Order; ``jobs`` processes. ``phantoms.json`` collects the
    records of all cases. ValueError when ``root`` holds cases of other settings.
    """
    counts = {LABELLED: labelled, UNLABELLED: unlabelled, TEST: test}
    orders = list(_orders(root, counts, seed, spacing, auxiliary))
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
    # Processes of their own, one BLAS thread each: a fork may not inherit a caller's thread pools.
    before = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(write_case, order) for order in orders]):
                yield future.result()
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m train phantom``."""
    parser.add_argument("out", type=Path, help="folder of the data set (created)")
    parser.add_argument("--labelled", type=int, default=8, metavar="N", help="cases of imagesTr / labelsTr (8)")
    parser.add_argument("--unlabelled", type=int, default=0, metavar="N", help="cases of unlabeled (0)")
    parser.add_argument("--test", type=int, default=0, metavar="N", help="cases of imagesTs / labelsTs, with truth (0)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another data set (0)")
    parser.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="mm; default: 512 x 512 at 0.6-0.9 mm, slices of 2-5 mm",
    )
    parser.add_argument(
        "--auxiliary", action="store_true", help=f"also write {AUXILIARY_FOLDER}: organs and the rest of the body"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")


def run(args: argparse.Namespace) -> int:
    """The sub-command: 0, or 1 with one line that says what was wrong."""
    spacing = tuple(args.spacing) if args.spacing else None
    counts = (args.labelled, args.unlabelled, args.test)
    if min(counts) < 0 or args.jobs < 1 or not 0 <= args.seed <= 200:
        log.error("counts must not be negative, --jobs at least 1, --seed between 0 and 200")
        return 1
    if spacing is not None and not all(0.3 <= s <= 20 for s in spacing):
        log.error("--spacing %s: each must lie between 0.3 and 20 mm", spacing)
        return 1
    try:
        write_dataset(args.out, *counts, seed=args.seed, spacing=spacing, auxiliary=args.auxiliary, jobs=args.jobs)
    except (OSError, ValueError) as error:
        log.error("%s", error)
        return 1
    return 0
