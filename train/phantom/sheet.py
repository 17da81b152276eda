"""A contact sheet of phantoms: each as an axial and a coronal slice in the abdominal window, all at one scale."""

import argparse
import io
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.image import imsave
from numpy.typing import NDArray

from inference.volume import atomic_write
from train.phantom.body import Body
from train.phantom.canvas import Grid
from train.phantom.disease import Disease
from train.phantom.scan import Phantom, generate

log = logging.getLogger(__name__)

Grey = NDArray[np.uint8]

WINDOW = (-160.0, 240.0)  # HU, as train.picture
SPACING = (3.0, 1.7, 1.7)  # mm (z, y, x)
BOX = (372.0, 306.0, 408.0)  # mm (z, y, x) around the body's centre and the height of LEVEL
LEVEL = 28.0  # mm above the disc L1/L2: pancreas, kidneys, gallbladder
COLUMNS = 5
GAP = 4
SHADES = 48  # of grey: fewer than 256, for a small file


def slices(seed: int) -> tuple[Phantom, Grid, int, int]:
    """The phantom of ``seed``, its grid, and the indices of the axial and the coronal slice to show."""
    z, y, x = BOX
    grid = Grid.covering((LEVEL - z / 2, 12 - y / 2, -x / 2), (LEVEL + z / 2, 12 + y / 2, x / 2), SPACING)
    kidneys = Body.draw(seed).spine(0)[1] - 14
    axial = int(np.argmin(np.abs(grid.coordinates(0) - LEVEL)))
    coronal = int(np.argmin(np.abs(grid.coordinates(1) - kidneys)))
    return generate(seed, grid, Disease()), grid, axial, coronal


def tile(seed: int) -> Grey:
    """Axial over coronal slice of one phantom, windowed to 0-255; pixels of 1.7 mm, head and front up."""
    phantom, grid, axial, coronal = slices(seed)
    low, high = WINDOW
    grey = np.clip((phantom.hu.astype(np.float32) - low) / (high - low), 0, 1)
    upright = grey[::-1, coronal]
    rows = np.arange(0, BOX[0], SPACING[1]) / SPACING[0]
    upright = upright[np.clip(rows.astype(int), 0, grid.shape[0] - 1)]
    picture = np.vstack([grey[axial], np.zeros((GAP, grid.shape[2]), np.float32), upright])
    return np.asarray(np.rint(np.rint(picture * (SHADES - 1)) * (255 / (SHADES - 1))), np.uint8)


def arrange(tiles: Iterable[Grey], columns: int = COLUMNS) -> Grey:
    """Tiles of one size, row by row, GAP black pixels between them."""
    padded = [np.pad(t, ((0, 4 * GAP), (0, GAP))) for t in tiles]
    padded += [np.zeros_like(padded[0])] * (-len(padded) % columns)
    rows = [np.hstack(padded[i : i + columns]) for i in range(0, len(padded), columns)]
    return np.asarray(np.vstack(rows), np.uint8)


def write_sheet(path: Path, seeds: Iterable[int]) -> None:
    """Write the sheet of ``seeds`` as a PNG."""
    tiles = []
    for seed in seeds:
        tiles.append(tile(seed))
        log.info("phantom %d", seed)
    content = io.BytesIO()
    imsave(content, arrange(tiles), format="png", cmap="gray", vmin=0, vmax=255, pil_kwargs={"optimize": True})
    atomic_write(path, content.getvalue())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m train phantom-sheet``."""
    parser.add_argument("out", type=Path, help="the PNG")
    parser.add_argument("--first", type=int, default=1, metavar="SEED", help="seed of the first phantom (1)")
    parser.add_argument("--count", type=int, default=20, metavar="N", help="phantoms (20)")


def run(args: argparse.Namespace) -> int:
    """The sub-command: 0, or 1 with one line that says what was wrong."""
    if args.count < 1 or args.first < 0:
        log.error("--count must be at least 1 and --first not negative")
        return 1
    try:
        write_sheet(args.out, range(args.first, args.first + args.count))
    except OSError as error:
        log.error("%s", error)
        return 1
    return 0
