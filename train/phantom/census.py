"""Volumes of the organs of many healthy bodies, beside the literature: the table of docs/phantoms.md.

A body is measured from its painted labels in a coarse grid that holds the whole abdomen; no scanner, no disease.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from inference.organs import ORGANS
from train.phantom.anatomy import Scene, build
from train.phantom.body import Body, field
from train.phantom.canvas import Canvas, Grid, recode
from train.phantom.disease import Disease
from train.phantom.tissue import label_table
from train.phantom.volumes import LIMITS, LITERATURE
from train.processes import process_pool

log = logging.getLogger(__name__)

Volumes = dict[str, float]

SPACING = (5.0, 4.0, 4.0)  # mm (z, y, x)
ABDOMEN = Grid.covering((-160, -225, -265), (190, 225, 265), SPACING)
PROGRESS = 25  # bodies between two lines of the log


def healthy_labels(seed: int) -> NDArray[np.uint8]:
    """FLARE22 labels (z, y, x) of the healthy body of ``seed`` in ABDOMEN."""
    body = Body.draw(seed)
    shape_field = field(body, seed)
    canvas = Canvas(ABDOMEN, shape_field.lattice, shape_field.displacement, shape_field.turn)
    build(Scene(seed, body, shape_field, canvas, Disease()))
    return recode(label_table({}), canvas.tissue)


def volumes(labels: NDArray[np.uint8]) -> Volumes:
    """mL of every organ in ``labels``, which lie on ABDOMEN's spacing."""
    counts = np.bincount(labels.ravel(), minlength=len(ORGANS) + 1) * (float(np.prod(SPACING)) / 1000)
    return {organ.name: float(counts[organ.id]) for organ in ORGANS}


def outside(measured: Volumes) -> Volumes:
    """Those of ``measured`` that lie outside LIMITS."""
    return {name: ml for name, ml in measured.items() if not LIMITS[name][0] <= ml <= LIMITS[name][1]}


def census(seeds: Iterable[int], jobs: int = 1) -> Iterator[tuple[int, Volumes]]:
    """Each seed with its body's volumes, in order; ``jobs`` processes."""
    seeds = list(seeds)
    if jobs <= 1:
        yield from zip(seeds, map(_measure, seeds), strict=True)
        return
    with process_pool(jobs) as pool:
        yield from zip(seeds, pool.map(_measure, seeds), strict=True)


def _measure(seed: int) -> Volumes:
    return volumes(healthy_labels(seed))


def table(bodies: Iterable[Volumes]) -> str:
    """Markdown: literature, median with the central 95 %, extremes and limits of every organ, mL."""
    rows = ["| organ | literature | phantoms | extremes | limits |", "|---|---|---|---|---|"]
    bodies = list(bodies)
    for name, literature in LITERATURE.items():
        values = np.array([body[name] for body in bodies])
        number: Callable[[float], str] = "{:.1f}".format if "adrenal" in name else "{:.0f}".format
        low, middle, high = (number(v) for v in np.percentile(values, (2.5, 50, 97.5)))
        extremes = f"{number(float(values.min()))}-{number(float(values.max()))}"
        limits = "-".join(f"{limit:g}" for limit in LIMITS[name])
        title = name.replace("_", " ").replace("inferior ", "").replace(" gland", "")
        rows.append(f"| {title} | {literature} | {middle} [{low}, {high}] | {extremes} | {limits} |")
    return "\n".join(rows) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m train phantom-volumes``."""
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="bodies (1000)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="seed of the first body (0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")


def run(args: argparse.Namespace) -> int:
    """The sub-command: the table on standard output; 0, or 1 where a body lies outside the limits or an option is wrong."""
    if min(args.seeds, args.jobs) < 1 or args.first < 0:
        log.error("--seeds and --jobs must be at least 1 and --first not negative")
        return 1
    bodies, wrong = [], 0
    for seed, measured in census(range(args.first, args.first + args.seeds), args.jobs):
        bodies.append(measured)
        for name, ml in outside(measured).items():
            log.warning("seed %d: %s of %.1f mL, outside %g-%g", seed, name, ml, *LIMITS[name])
            wrong += 1
        if len(bodies) % PROGRESS == 0 or len(bodies) == args.seeds:
            log.info("%d of %d bodies", len(bodies), args.seeds)
    sys.stdout.write(table(bodies))
    if wrong:
        log.error("%d organs of %d bodies lie outside their limits", wrong, len(bodies))
    return int(wrong > 0)
