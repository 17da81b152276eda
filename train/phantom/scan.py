"""One synthetic scan from a seed: body, anatomy, appearance, truth. ``generate`` is the main path of this package."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inference.organs import ORGANS
from train.phantom.anatomy import Scene, build
from train.phantom.appearance import Scanner, draw_look, phase_record, render, sheets
from train.phantom.artefact import Artefacts, circle
from train.phantom.body import Body, field, stream
from train.phantom.canvas import Canvas, Grid, recode
from train.phantom.disease import Disease
from train.phantom.pathology import paint, settle
from train.phantom.tissue import Tissue, auxiliary_table, label_table


@dataclass(frozen=True)
class Phantom:
    """A synthetic scan with its truth; arrays are (z, y, x), LPS.

    ``hu`` int16; ``labels`` uint8 FLARE22 ids; ``auxiliary`` uint8: the same ids, and the rest of the body in the classes
    of AUXILIARY; ``spacing`` mm (z, y, x); ``record`` what was drawn, JSON-able.
    """

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    auxiliary: NDArray[np.uint8]
    spacing: tuple[float, float, float]
    record: dict[str, Any]


def generate(
    seed: int,
    grid: Grid,
    disease: Disease | None = None,
    artefacts: Artefacts | None = None,
    thickness: float | None = None,
) -> Phantom:
    """The phantom of ``seed`` seen through ``grid``. The same seed is the same body at any grid, and the same bytes.

    ``thickness`` of a slice in mm; None: as far as the slices are apart.
    """
    disease, artefacts, thickness = disease or Disease(), artefacts or Artefacts(), thickness or grid.spacing[0]
    body = Body.draw(seed)
    shape_field = settle(field(body, seed), body, disease)
    factor = _sheets_per_slice(grid)
    canvas = Canvas(sheets(grid, factor), shape_field.lattice, shape_field.displacement, shape_field.turn)
    scene = Scene(seed, body, shape_field, canvas, disease)
    build(scene)
    paint(scene, seed)
    _table_top(seed, body, canvas)
    look = draw_look(stream(seed, "appearance"), disease, scene.lesions)
    scanner = Scanner.draw(stream(seed, "scanner"), thickness, artefacts.low_dose)
    canvas.points = (look.hu[:1], look.hu[:1], look.hu[:1])  # painted: the coordinates' memory is wanted for the image
    image, drawn = render(seed, canvas, factor, look, scanner, artefacts, scene.arms)
    tissue = canvas.tissue[factor // 2 :: factor]
    if artefacts.truncation:
        tissue = np.where(circle(grid, artefacts.truncation), tissue, np.uint8(Tissue.AIR))
    owners = {tissue: lesion.organ for tissue, lesion in scene.lesions.items()}
    labels = recode(label_table(owners), tissue)
    record: dict[str, Any] = {
        "seed": seed,
        "shape": list(grid.shape),
        "spacing": list(grid.spacing),
        "phase": phase_record(look.phase),
        **drawn,
        "disease": asdict(disease),
        "lesions": [
            {"organ": v.organ, "kind": v.kind, "ml": _millilitres(tissue, grid, k)} for k, v in scene.lesions.items()
        ],
        "tissues": {
            name: _millilitres(tissue, grid, k)
            for name, k in (
                ("ascites", Tissue.ASCITES),
                ("effusion", Tissue.EFFUSION),
                ("urine", Tissue.URINE),
                ("metal", Tissue.METAL),
            )
        },
        "organs": _organs(labels, grid),
    }
    return Phantom(image, labels, recode(auxiliary_table(owners), tissue), grid.spacing, record)


def _sheets_per_slice(grid: Grid) -> int:
    """Three where slices are thick and pixels large: thin structures fade in them. Else the scan's own grid will do."""
    return 3 if grid.spacing[0] >= 3.5 and 0.95 <= grid.spacing[1] <= 2 else 1


def _millilitres(array: NDArray[np.uint8], grid: Grid, value: int) -> float:
    return round(float(np.count_nonzero(array == value)) * float(np.prod(grid.spacing)) / 1000, 3)


def _organs(labels: NDArray[np.uint8], grid: Grid) -> dict[str, dict[str, float | bool]]:
    """Volume in the field of view of every organ, and whether the first or last slice cuts it."""
    voxel = float(np.prod(grid.spacing)) / 1000
    counts = np.bincount(labels.ravel(), minlength=14)
    ends = set(np.unique(labels[[0, -1]]).tolist())
    return {o.name: {"ml": round(float(counts[o.id]) * voxel, 3), "cut": o.id in ends} for o in ORGANS}


def _table_top(seed: int, body: Body, canvas: Canvas) -> None:
    """The couch behind the back: a thin curved shell, foam inside."""
    r = stream(seed, "view")
    gap, there, bend = r.uniform(4, 14), r.random() < 0.9, r.uniform(0.0004, 0.0012)
    if not there:
        return
    grid = canvas.grid
    x, y = grid.coordinates(2), grid.coordinates(1)
    surface = body.half_depth * 0.98 + gap - bend * x**2 * 0.5
    below = y[:, None] - surface[None, :]
    across = np.abs(x)[None, :] < 215
    shell = ((np.abs(below) < 1.6) | (np.abs(below - 26) < 1.6)) & across
    air = canvas.tissue == Tissue.AIR
    air &= shell[None]
    canvas.tissue[air] = Tissue.TABLE
