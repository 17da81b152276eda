"""The sliding window on the device that computes the network: windows go up, labels on the scan's grid come down.

Logits of a scan are gigabytes, and taking them to the host, adding them up and interpolating them there costs several times
what the network does. Here the sums of one row of windows stay on the device: nodes behind the network weight a window's
logits and add them to the row, a second small graph interpolates what is settled and takes the arg-max.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from inference.engine import EngineError, OnnxRuntimeEngine
from inference.onnx_file import FLOAT, FLOAT16, INT64, UINT8, Node, Port, model, open_port
from inference.resample import Axis, Floats, axis
from inference.sliding_window import Layout, Progress
from inference.volume import Labels, Shape

# Enters a stage whose seconds are counted.
Stage = Callable[[str], AbstractContextManager[None]]
# Bytes of interpolated logits at a time, and of a row's sums; beyond the second the host adds up.
CHUNK_BYTES = 2**25
ROW_BYTES = 2**28


@dataclass(frozen=True)
class Carried:
    """Host copy of (1, classes, n, y, x) logits from slice ``first`` of the padded image on: the last slice that the row
    before settled, and what its windows add to this row."""

    first: int
    values: npt.NDArray[Any]


class Stitcher:
    """Runs an engine's network over scans; made once per engine."""

    def __init__(self, engine: OnnxRuntimeEngine, classes: int) -> None:
        self._engine = engine
        self._classes = classes
        kind = FLOAT16 if engine.type is np.float16 else FLOAT
        self._settle = engine.session(settling_graph(kind))
        self._finish = engine.session(finishing_graph(kind))

    def fits(self, layout: Layout) -> bool:
        """Whether the device may hold the sums of a row of windows."""
        row = self._classes * layout.patch[0] * layout.padded[1] * layout.padded[2]
        return self._engine.adds_up and row * np.dtype(self._engine.type).itemsize <= ROW_BYTES

    def labels(
        self, image: Floats, layout: Layout, target: Shape, stage: Stage, progress: Progress | None = None
    ) -> Labels:
        """Label map on the grid ``target`` (z, y, x) of a normalised image on the working grid. Raises EngineError.

        ``stage``: what is entered for the stages ``network`` and ``labels``.
        """
        out = np.empty(target, np.uint8)
        planes = axis(image.shape[0], target[0])
        padded = layout.pad(image).astype(self._engine.type)
        done = 0
        carried = None
        for z, after, sums in self._rows(padded, layout, stage, progress):
            settled = int(np.searchsorted(planes.high + layout.before[0], after))
            with stage("labels"):
                for chunk in self._chunks(done, settled, target):
                    within = Axis(planes.low[chunk], planes.high[chunk], planes.fraction[chunk])
                    self._paint(out[chunk], sums, carried, z, within, layout)
                done = max(done, settled)
                carried = self._carry(sums, carried, z, after, layout)
        return out

    def _rows(
        self, padded: npt.NDArray[Any], layout: Layout, stage: Stage, progress: Progress | None
    ) -> Iterator[tuple[int, int, Any]]:
        """First slice of each row of windows, that of the next row, and the row's sums on the device."""
        done = 0
        starts = layout.starts[0]
        for z, after in zip(starts, [*starts[1:], layout.padded[0]], strict=True):
            sums: Any = np.zeros((1, 1, 1, 1, 1), self._engine.type)
            with stage("network"):
                for window in layout.row(z):
                    sums = self._engine.add_window(padded, window, sums)
                    done += 1
                    if progress:
                        progress(done, layout.windows)
            expected = [1, self._classes, layout.patch[0], *layout.padded[1:]]
            if list(sums.shape()) != expected:
                raise EngineError(f"the network's row of windows is {sums.shape()}; expected {expected}")
            yield z, after, sums

    def _chunks(self, first: int, last: int, target: Shape) -> Iterator[slice]:
        size = self._classes * target[1] * target[2] * np.dtype(self._engine.type).itemsize
        step = max(1, CHUNK_BYTES // size)
        for start in range(first, last, step):
            yield slice(start, min(start + step, last))

    def _paint(self, out: Labels, sums: Any, carried: Carried | None, z: int, planes: Axis, layout: Layout) -> None:
        """Labels of some slices of the scan, whose ``planes`` lie between slice z - 1 and what the row settled."""
        low, high = planes.low + layout.before[0], planes.high + layout.before[0]
        first, last = int(low[0]), int(high[-1]) + 1
        start = max(first, z)
        feeds = {
            "sums": sums,
            **_crop(start - z, last - z, layout),
            "pads": np.array([0, 0, start - first, 0, 0, 0, 0, 0, 0, 0], np.int64),
            "carried": self._piece(carried, first, last),
            "low": low - first,
            "high": high - first,
            "fraction": planes.fraction[None, :, None, None],
            "size": np.array([self._classes, len(out), *out.shape[1:]], np.int64),
        }
        out[...] = self._engine.run(self._finish, feeds)

    def _carry(self, sums: Any, carried: Carried | None, z: int, after: int, layout: Layout) -> Carried:
        """What the next row needs of this one: slice ``after`` - 1 and all above it."""
        first, last = after - 1, z + layout.patch[0]
        feeds = {
            "sums": sums,
            **_crop(first - z, last - z, layout),
            "carried": self._piece(carried, first, last),
            "pads": np.zeros(10, np.int64),
        }
        return Carried(first, self._engine.run(self._settle, feeds))

    def _piece(self, carried: Carried | None, first: int, last: int) -> npt.NDArray[Any]:
        """Slices [first, last) of what was carried; a single 0 where nothing was."""
        if carried is None or carried.first + carried.values.shape[2] <= first:
            return np.zeros((1, 1, 1, 1, 1), self._engine.type)
        found = carried.values[:, :, first - carried.first : last - carried.first]
        missing = last - first - found.shape[2]
        return np.ascontiguousarray(np.pad(found, ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0))))


def settling_graph(kind: int) -> bytes:
    """ONNX: a part of a row's sums, with what the row before carried into it."""
    return model(_settling("settled"), _settling_ports(kind), [open_port("settled", kind, 5)])


def finishing_graph(kind: int) -> bytes:
    """ONNX: a part of a row's sums to labels (z, y, x) on the scan's grid: linear along z, bilinear in plane, arg-max."""
    nodes = [
        *_settling("settled"),
        Node("Squeeze", ["settled", "batch"], ["logits"]),
        Node("Gather", ["logits", "low"], ["lower"], {"axis": 1}),
        Node("Gather", ["logits", "high"], ["upper"], {"axis": 1}),
        Node("Sub", ["upper", "lower"], ["difference"]),
        Node("Mul", ["difference", "fraction"], ["step"]),
        Node("Add", ["lower", "step"], ["planes"]),
        Node(
            "Resize",
            ["planes", "", "", "size"],
            ["resized"],
            {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
        ),
        Node("ArgMax", ["resized"], ["winners"], {"axis": 0, "keepdims": 0}),
        Node("Cast", ["winners"], ["labels"], {"to": UINT8}),
    ]
    ports = [
        *_settling_ports(kind),
        open_port("low", INT64, 1),
        open_port("high", INT64, 1),
        open_port("fraction", kind, 4),
        Port("size", INT64, (4,)),
    ]
    batch = Node("Constant", [], ["batch"], {"value_ints": [0]})
    return model([batch, *nodes], ports, [open_port("labels", UINT8, 3)])


def _settling(output: str) -> list[Node]:
    return [
        Node("Constant", [], ["axes"], {"value_ints": [2, 3, 4]}),
        Node("Slice", ["sums", "starts", "ends", "axes"], ["cropped"]),
        Node("Pad", ["cropped", "pads"], ["framed"]),
        Node("Add", ["framed", "carried"], [output]),
    ]


def _settling_ports(kind: int) -> list[Port]:
    return [
        open_port("sums", kind, 5),
        open_port("starts", INT64, 1),
        open_port("ends", INT64, 1),
        open_port("pads", INT64, 1),
        open_port("carried", kind, 5),
    ]


def _crop(first: int, last: int, layout: Layout) -> dict[str, npt.NDArray[np.int64]]:
    """Slices [first, last) of a row, without the margins in plane."""
    _, y, x = layout.inside
    return {
        "starts": np.array([first, y.start, x.start], np.int64),
        "ends": np.array([last, y.stop, x.stop], np.int64),
    }
