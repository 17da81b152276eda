"""A scan and its organ mask in three planes, as a PNG: what a reader looks at before any figure.

Displayed as radiologists do: the patient's right on the left of the picture, anterior up in the axial plane, head up in
the others; the abdominal window; millimetres equal along both axes.
"""

import argparse
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy import ndimage

from inference.organs import ORGANS, Organ
from inference.volume import Array, Labels, VolumeError, atomic_write, read_labels, read_volume
from train.evaluate import check_same_grid
from train.metrics import Spacing, dice
from train.trunk import trunk_box

log = logging.getLogger(__name__)

# HU, width 400 around level 40: soft tissue of the abdomen.
WINDOW = (-160.0, 240.0)

# Found by a search for the largest distance between any two, seen normally and with each of the three colour vision
# deficiencies, more for organs that touch; aorta red, vena cava blue and gallbladder green as anatomists draw them.
COLOURS: dict[str, str] = {
    "liver": "#f99b00",
    "right_kidney": "#ef0d7e",
    "spleen": "#8bdcff",
    "pancreas": "#c486ad",
    "aorta": "#fb1a2e",
    "inferior_vena_cava": "#1e9cf8",
    "right_adrenal_gland": "#b8ff72",
    "left_adrenal_gland": "#ecf30e",
    "gallbladder": "#438c32",
    "esophagus": "#da36bb",
    "stomach": "#7a63ff",
    "duodenum": "#18ff95",
    "left_kidney": "#a3a973",
}

BACKGROUND = "#101114"
INK = "#e8e8ea"
FAINT = "#85878e"
FILL_OPACITY = 0.38
DPI = 150
# Inches of the picture: its planes share this width, or height where they are tall; the legend has its own width.
PLANES_WIDTH = 12.5
PLANES_HEIGHT = 8.0
LEGEND_WIDTH = 3.1
MARGIN = 0.25
TITLE_HEIGHT = 0.42
LINE_HEIGHT = 0.29
# Left, right, top and bottom of a plane: x, y and how the letter hangs there.
LETTER_PLACES = (
    (0.012, 0.5, "left", "center"),
    (0.988, 0.5, "right", "center"),
    (0.5, 0.985, "center", "top"),
    (0.5, 0.015, "center", "bottom"),
)
# Of a slab flatter than this, the letters at top and bottom would cover each other.
FLAT = 0.2
# Letters lie on bone as well as on air.
SHADOW = [patheffects.withStroke(linewidth=2.2, foreground="black")]
# mm shown above and below the organs: a whole-body scan would shrink them to stamps.
BEYOND_ORGANS = 40.0
AROUND_BODY = 10.0


@dataclass(frozen=True)
class Plane:
    """One cut: its title, the axis it is perpendicular to, the slice, and letters left, right, top, bottom.

    ``axis``: 0 axial, 1 coronal, 2 sagittal, of arrays (z, y, x) with x to the patient's left and y to posterior.
    """

    name: str
    axis: int
    index: int
    letters: str

    def cut(self, voxels: Array) -> Array:
        """The slice as rows from the top of the picture and columns from its left."""
        section: Array = np.take(voxels, self.index, self.axis)
        # z grows to superior and rows grow downwards: coronal and sagittal stand on their heads.
        return section if self.axis == 0 else section[::-1]

    def pixel(self, spacing: Spacing) -> tuple[float, float]:
        """mm of a pixel, (row, column)."""
        row, column = (size for axis, size in enumerate(spacing) if axis != self.axis)
        return row, column


def render(scan: Array, labels: Labels, spacing: Spacing, reference: Labels | None = None, title: str = "") -> Figure:
    """Draw axial, coronal and sagittal cuts through the organs, coloured, with a legend of volumes.

    ``scan``: (z, y, x) in HU, ``labels`` and ``reference``: label maps of its shape; all with x to the patient's left, y
    to posterior, z to superior. ``spacing``: mm, (z, y, x). With a ``reference`` a second row shows it, its contours lie
    in white on the first, and the legend gives DSC over the whole volume.
    Raises ValueError if the shapes differ.
    """
    rows = [labels] if reference is None else [labels, reference]
    for mask in rows:
        if mask.shape != scan.shape:
            raise ValueError(f"the scan is {scan.shape}, a mask {mask.shape} (z, y, x)")
    shown = _shown_part(scan, np.maximum.reduce(rows), spacing)
    planes = choose_planes([mask[shown] for mask in rows])
    figure, axes, legend = _layout(planes, [size.stop - size.start for size in shown], spacing, rows, title)
    for row, mask in enumerate(rows):
        for plane, ax in zip(planes, axes[row], strict=True):
            outline = reference[shown] if reference is not None and row == 0 else None
            _draw_plane(ax, plane, scan[shown], mask[shown], spacing, outline)
    for plane, ax in zip(planes, axes[0], strict=True):
        number = plane.index + shown[plane.axis].start + 1
        _draw_title(ax, f"{plane.name}  {number} / {scan.shape[plane.axis]}", FAINT, "right")
    if reference is not None:
        for row_axes, name in zip(axes, ("prediction, reference in white", "reference"), strict=True):
            _draw_title(row_axes[0], name, INK, "left")
    _draw_scale(axes[0][0], planes[0], [size.stop - size.start for size in shown], spacing)
    # Lines of equal height in inches, however tall the picture.
    line = LINE_HEIGHT / (legend.get_position().height * figure.get_figheight())
    _draw_legend(legend, line, labels, spacing, reference)
    return figure


def choose_planes(masks: Sequence[Labels]) -> tuple[Plane, Plane, Plane]:
    """The most informative cut along each axis of label maps (z, y, x) of one shape.

    Each organ votes with its area in a slice over its largest area in any: a full adrenal counts as a full liver.
    No organ anywhere: the middle.
    """
    letters = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
    planes = []
    for axis, name in enumerate(letters):
        others = tuple(other for other in range(3) if other != axis)
        votes = np.zeros(masks[0].shape[axis])
        for mask in masks:
            for organ in ORGANS:
                area = np.count_nonzero(mask == organ.id, axis=others)
                votes += area / max(1, area.max())
        # Where slices tie, as all do in an empty mask, the one nearest to the middle.
        distance = np.abs(np.arange(len(votes)) - (len(votes) - 1) / 2)
        index = int(np.lexsort((distance, -votes))[0])
        planes.append(Plane(name, axis, index, letters[name]))
    return planes[0], planes[1], planes[2]


def write_picture(scan: Path, mask: Path, png: Path, reference: Path | None = None) -> None:
    """Draw files. Raises VolumeError for an unreadable file, EvaluationError (a ValueError) for a mask on another grid."""
    volume, labels = read_volume(scan), read_labels(mask)
    check_same_grid(mask, labels, scan, volume)
    truth = None
    if reference is not None:
        truth = read_labels(reference)
        check_same_grid(reference, truth, scan, volume)
    case = scan.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")
    figure = render(volume.voxels, labels.voxels, volume.spacing, None if truth is None else truth.voxels, case)
    png.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(png, png_bytes(figure))


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, facecolor=BACKGROUND, metadata={"Software": None})
    return content.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m train picture``."""
    parser.description = "Draw a scan and its organ mask in three planes, with a legend of volumes."
    parser.add_argument("scan", type=Path, metavar="SCAN", help="CT scan, .nii.gz or .nii")
    parser.add_argument("mask", type=Path, metavar="MASK", help="label map on the scan's grid")
    parser.add_argument("--reference", type=Path, metavar="MASK", help="true label map, shown beside the other")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PNG", help="the picture to write")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 if the picture was written, 2 if a file cannot be used or written."""
    try:
        write_picture(args.scan, args.mask, args.output, args.reference)
    except (VolumeError, ValueError) as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("%s: cannot be written (%s)", args.output, error.strerror)
        return 2
    log.info("wrote %s", args.output)
    return 0


def _shown_part(scan: Array, organs: Labels, spacing: Spacing) -> tuple[slice, slice, slice]:
    """The part of the scan that is drawn: in plane the patient, along z the organs and some more."""
    found = ndimage.find_objects((organs > 0).astype(np.uint8))
    z, y, x = found[0] if found else (slice(0, scan.shape[0]), None, None)
    z = _widened([z], BEYOND_ORGANS / spacing[0], scan.shape[0])
    rows, columns = trunk_box(scan[z])
    y = _widened([rows, y or rows], AROUND_BODY / spacing[1], scan.shape[1])
    x = _widened([columns, x or columns], AROUND_BODY / spacing[2], scan.shape[2])
    return z, y, x


def _widened(parts: Sequence[slice], margin: float, size: int) -> slice:
    """The indices of an axis of ``size`` from the first to the last of ``parts``, and ``margin`` more on either side."""
    start, stop = min(part.start for part in parts), max(part.stop for part in parts)
    return slice(max(0, start - round(margin)), min(size, stop + round(margin)))


def _layout(
    planes: Sequence[Plane], shape: Sequence[int], spacing: Spacing, rows: Sequence[Labels], title: str
) -> tuple[Figure, list[list[Axes]], Axes]:
    """A figure with one axes per plane and row, all at one scale (inches per mm), and one for the legend."""
    extent = [size * mm for size, mm in zip(shape, spacing, strict=True)]
    sizes = [[mm for axis, mm in enumerate(extent) if axis != plane.axis] for plane in planes]
    gaps = MARGIN * (len(planes) - 1)
    widest, tallest = sum(width for _, width in sizes), max(height for height, _ in sizes)
    scale = min((PLANES_WIDTH - gaps) / widest, PLANES_HEIGHT / tallest)
    row_height = tallest * scale
    head = TITLE_HEIGHT + (0.35 if title else 0)
    height = head + len(rows) * row_height + (len(rows) - 1) * TITLE_HEIGHT + MARGIN
    height = max(height, head + (len(ORGANS) + 1) * LINE_HEIGHT + MARGIN)
    width = MARGIN + widest * scale + gaps + MARGIN + LEGEND_WIDTH + MARGIN
    figure = Figure(figsize=(width, height), facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    axes = []
    for row in range(len(rows)):
        top = height - head - row * (row_height + TITLE_HEIGHT)
        left, line = MARGIN, []
        for down, across in sizes:
            box = (left, top - down * scale, across * scale, down * scale)
            line.append(figure.add_axes(_fractions(box, width, height)))
            left += across * scale + MARGIN
        axes.append(line)
    if title:
        figure.text(MARGIN / width, 1 - 0.3 / height, title, color=INK, fontsize=12, va="center")
    box = (width - MARGIN - LEGEND_WIDTH, MARGIN, LEGEND_WIDTH, height - head - MARGIN)
    return figure, axes, figure.add_axes(_fractions(box, width, height))


def _fractions(
    box: tuple[float, float, float, float], width: float, height: float
) -> tuple[float, float, float, float]:
    left, bottom, across, up = box
    return left / width, bottom / height, across / width, up / height


def _draw_plane(
    ax: Axes, plane: Plane, scan: Array, labels: Labels, spacing: Spacing, reference: Labels | None
) -> None:
    image, mask = plane.cut(scan), plane.cut(labels)
    row, column = plane.pixel(spacing)
    low, high = WINDOW
    ax.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=row / column, interpolation="bilinear")
    ax.set_autoscale_on(False)
    for organ in ORGANS:
        _draw_organ(ax, mask == organ.id, COLOURS[organ.name])
    if reference is not None:
        truth = plane.cut(reference)
        for organ in ORGANS:
            _draw_contour(ax, truth == organ.id, "white", 0.7)
    ax.set_axis_off()
    tall = image.shape[0] * row > FLAT * image.shape[1] * column
    for letter, (x, y, ha, va) in zip(plane.letters, LETTER_PLACES if tall else LETTER_PLACES[:2], strict=False):
        ax.text(x, y, letter, color=INK, fontsize=10, ha=ha, va=va, transform=ax.transAxes, path_effects=SHADOW)


def _draw_title(ax: Axes, text: str, colour: str, side: Literal["left", "right"]) -> None:
    ax.set_title(text, color=colour, fontsize=9, pad=5, loc=side)


def _draw_organ(ax: Axes, mask: npt.NDArray[np.bool_], colour: str) -> None:
    if mask.any():
        # Padded, so that an organ at the picture's edge is closed and filled there.
        x, y, padded = _padded(mask)
        ax.contourf(x, y, padded, levels=[0.5, 1.5], colors=[colour], alpha=FILL_OPACITY)
        _draw_contour(ax, mask, colour, 1.3)


def _draw_contour(ax: Axes, mask: npt.NDArray[np.bool_], colour: str, width: float) -> None:
    if mask.any():
        x, y, padded = _padded(mask)
        ax.contour(x, y, padded, levels=[0.5], colors=[colour], linewidths=width)


def _padded(mask: npt.NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    rows, columns = mask.shape
    return np.arange(-1, columns + 1), np.arange(-1, rows + 1), np.pad(mask, 1).astype(np.float32)


def _draw_scale(ax: Axes, plane: Plane, shape: Sequence[int], spacing: Spacing) -> None:
    """A bar of 5 cm in the lower right corner."""
    rows, columns = (size for axis, size in enumerate(shape) if axis != plane.axis)
    length = 50 / plane.pixel(spacing)[1]
    if length > 0.4 * columns:
        return
    right, bottom = 0.965 * columns, 0.955 * rows
    ax.plot(
        [right - length, right], [bottom, bottom], color=INK, linewidth=1.6, solid_capstyle="butt", path_effects=SHADOW
    )
    ax.text(
        right - length / 2,
        bottom - 0.012 * rows,
        "5 cm",
        color=INK,
        fontsize=8,
        ha="center",
        va="bottom",
        path_effects=SHADOW,
    )


def _draw_legend(ax: Axes, line: float, labels: Labels, spacing: Spacing, reference: Labels | None) -> None:
    """Organ, volume in mL, and with a reference its volume and DSC; organs that no mask holds are faint.

    ``line``: the height of a line as a fraction of the axes'.
    """
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_axis_off()
    heads = ["mL"] if reference is None else ["mL", "ref.", "DSC"]
    places = [1.0] if reference is None else [0.7, 0.85, 1.0]
    for place, head in zip(places, heads, strict=True):
        ax.text(place, 1 - line / 2, head, color=FAINT, fontsize=9, ha="right", va="center")
    for number, organ in enumerate(ORGANS, start=1):
        y = 1 - (number + 0.5) * line
        values = _legend_values(organ, labels, spacing, reference)
        absent = all(value == "–" for value in values)
        _draw_swatch(ax, y, line, COLOURS[organ.name], absent)
        ink = FAINT if absent else INK
        ax.text(0.085, y, organ.title, color=ink, fontsize=9.5, va="center")
        for place, value in zip(places, values, strict=True):
            ax.text(place, y, value, color=ink, fontsize=9.5, ha="right", va="center")


def _draw_swatch(ax: Axes, y: float, line: float, colour: str, absent: bool) -> None:
    box = (0.0, y - 0.3 * line), 0.055, 0.6 * line
    if not absent:
        ax.add_patch(Rectangle(*box, facecolor=colour, alpha=0.55, linewidth=0, clip_on=False))
    opacity = 0.4 if absent else 1.0
    ax.add_patch(Rectangle(*box, fill=False, edgecolor=colour, linewidth=1.3, alpha=opacity, clip_on=False))


def _legend_values(organ: Organ, labels: Labels, spacing: Spacing, reference: Labels | None) -> list[str]:
    mask = labels == organ.id
    if reference is None:
        return [_millilitres(mask, spacing)]
    truth = reference == organ.id
    agreement = f"{dice(truth, mask):.2f}" if mask.any() or truth.any() else "–"
    return [_millilitres(mask, spacing), _millilitres(truth, spacing), agreement]


def _millilitres(mask: npt.NDArray[np.bool_], spacing: Spacing) -> str:
    millilitres = np.count_nonzero(mask) * float(np.prod(spacing)) / 1000
    if millilitres == 0:
        return "–"
    return f"{millilitres:.0f}" if millilitres >= 10 else f"{millilitres:.1f}"
