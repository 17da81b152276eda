"""The GPU's way from windows to labels, on ONNX Runtime's CPU provider: the same graphs, the same labels as on the host."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import pytest

from inference import stitching
from inference.engine import EngineError, OnnxRuntimeEngine
from inference.onnx_file import FLOAT, FLOAT16
from inference.pipeline import Options, Segmenter
from inference.resample import labels_on_grid
from inference.sliding_window import Layout, sliding_window
from inference.stitching import Stitcher, finishing_graph, settling_graph
from inference.volume import Volume
from tests.conftest import block_levels, block_scan, level_model, make_bundle

pytest.importorskip("onnxruntime")
PATCH = (8, 16, 16)
CLASSES = 14


@contextmanager
def stage(name: str) -> Iterator[None]:
    assert name in ("network", "labels")
    yield


def make_engine(**options: Any) -> OnnxRuntimeEngine:
    # Looks at its neighbours behind and above: at a window's border the answer depends on where the window lies.
    return OnnxRuntimeEngine(make_bundle(level_model(shift=(0, 1, -1), **options)), "f32", "CPUExecutionProvider")


@pytest.fixture(scope="module")
def engine() -> OnnxRuntimeEngine:
    return make_engine()


def smooth(shape: tuple[int, int, int]) -> np.ndarray:
    """Levels from 0 to 13 in hills of some ten voxels."""
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    hills = sum(np.sin(0.3 * axis + 0.05 * n * axis + n) for n, axis in enumerate(grid))
    return (6.5 + 2.1 * hills).astype(np.float32)


def on_the_host(engine: OnnxRuntimeEngine, image: np.ndarray, step: float, target: tuple[int, int, int]) -> np.ndarray:
    return labels_on_grid(sliding_window(image, PATCH, step, engine), len(image), target)


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((8, 16, 16), (8, 16, 16)),
        ((5, 9, 12), (11, 30, 31)),
        ((1, 16, 16), (4, 16, 16)),
        ((30, 20, 40), (17, 50, 33)),
        ((23, 16, 33), (61, 16, 70)),
        ((40, 33, 17), (40, 12, 9)),
    ],
)
@pytest.mark.parametrize("step", [0.5, 0.9])
def test_labels_equal_those_made_on_the_host(
    engine: OnnxRuntimeEngine, shape: tuple, target: tuple, step: float
) -> None:
    image = smooth(shape)
    found = Stitcher(engine, CLASSES).labels(image, Layout.of(shape, PATCH, step), target, stage)
    wanted = on_the_host(engine, image, step, target)
    assert found.dtype == np.uint8
    assert len(np.unique(wanted)) > 4
    # Sums in another order: a voxel where two classes tie may go either way.
    assert np.count_nonzero(found != wanted) <= 2e-4 * found.size


def test_labels_do_not_depend_on_how_many_slices_are_finished_at_a_time(
    engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, target = smooth((30, 20, 24)), (50, 40, 30)
    layout = Layout.of((30, 20, 24), PATCH, 0.5)
    whole = Stitcher(engine, CLASSES).labels(image, layout, target, stage)
    for count in (1, 3):
        monkeypatch.setattr(stitching, "CHUNK_BYTES", count * CLASSES * 40 * 30 * 4)
        np.testing.assert_array_equal(Stitcher(engine, CLASSES).labels(image, layout, target, stage), whole)


def test_half_precision_moves_few_voxels() -> None:
    shape, target = (20, 30, 24), (31, 50, 40)
    found = Stitcher(make_engine(half=True), CLASSES).labels(smooth(shape), Layout.of(shape, PATCH, 0.9), target, stage)
    wanted = on_the_host(make_engine(), smooth(shape), 0.9, target)
    assert np.count_nonzero(found != wanted) < 0.02 * found.size


def test_every_window_is_counted(engine: OnnxRuntimeEngine) -> None:
    seen: list[tuple[int, int]] = []
    layout = Layout.of((16, 16, 30), PATCH, 0.9)
    Stitcher(engine, CLASSES).labels(
        smooth((16, 16, 30)), layout, (16, 16, 30), stage, lambda done, all_: seen.append((done, all_))
    )
    assert seen == [(number + 1, layout.windows) for number in range(layout.windows)]


def test_a_row_too_large_for_the_device_is_left_to_the_host(
    engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout.of((30, 40, 50), PATCH, 0.5)
    stitcher = Stitcher(engine, CLASSES)
    assert stitcher.fits(layout)
    monkeypatch.setattr(stitching, "ROW_BYTES", CLASSES * 8 * 40 * 50 * 4)
    assert stitcher.fits(layout)
    monkeypatch.setattr(stitching, "ROW_BYTES", CLASSES * 8 * 40 * 50 * 4 - 1)
    assert not stitcher.fits(layout)


def test_a_network_of_other_classes_is_told() -> None:
    with pytest.raises(EngineError, match="row of windows is"):
        Stitcher(make_engine(), 9).labels(smooth(PATCH), Layout.of(PATCH, PATCH, 0.9), PATCH, stage)


def break_after(count: int, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, which fails as ONNX Runtime does once it was called ``count`` times."""
    calls = iter(range(count))

    def failing(*arguments: Any) -> Any:
        if next(calls, None) is None:
            raise EngineError("stitching failed: CUDA error 700")
        return run(*arguments)

    return failing


BLOCKS = Volume(block_scan(block_levels()), (4.0, 2.0, 2.0), np.eye(4), None, np.eye(3))


def segmenter(engine: OnnxRuntimeEngine) -> Segmenter:
    return Segmenter(make_bundle(), engine, Options(postprocess=False))


@pytest.mark.parametrize("name", ["run", "add_window"])
def test_where_the_device_cannot_stitch_the_host_does_and_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = segmenter(make_engine()).segment(BLOCKS)
    assert wanted.warnings == ()
    engine = make_engine()
    broken = segmenter(engine)
    monkeypatch.setattr(engine, name, break_after(3, getattr(engine, name)))
    for _ in range(2):
        found = broken.segment(BLOCKS)
        np.testing.assert_array_equal(found.labels, wanted.labels)
        assert found.warnings == (
            "the device could not add windows up, so the host does (stitching failed: CUDA error 700)",
        )
        assert min(found.seconds.values()) >= 0
    assert not engine.adds_up


def test_graphs_that_the_device_refuses_leave_stitching_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    monkeypatch.setattr(engine, "session", break_after(0, engine.session))
    found = segmenter(engine).segment(BLOCKS)
    np.testing.assert_array_equal(found.labels, segmenter(make_engine()).segment(BLOCKS).labels)
    assert "so the host does" in found.warnings[0]


@pytest.mark.parametrize("kind", [FLOAT, FLOAT16])
def test_the_graphs_are_valid_onnx(kind: int) -> None:
    for graph in (settling_graph(kind), finishing_graph(kind)):
        onnx.checker.check_model(graph, full_check=True)
