import threading

import numpy as np
import pytest

from inference.engine import OnnxRuntimeEngine, OpenVinoEngine
from inference.pipeline import Segmenter
from inference.postprocess import Context, postprocess
from inference.resample import labels_on_grid
from inference.sliding_window import sliding_window
from inference.threads import in_turn, side_by_side
from tests.conftest import make_bundle

PATCH = (8, 16, 16)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_part_is_worked_on_once(threads: int) -> None:
    seen: list[int] = []
    side_by_side(threads)(seen.append, range(20))
    assert sorted(seen) == list(range(20))


def test_one_thread_keeps_the_order_and_starts_no_other() -> None:
    seen: list[tuple[int, threading.Thread]] = []
    side_by_side(1)(lambda part: seen.append((part, threading.current_thread())), range(5))
    assert seen == [(part, threading.current_thread()) for part in range(5)]


def test_two_parts_run_at_the_same_time() -> None:
    both = threading.Barrier(2)
    side_by_side(2)(lambda part: both.wait(timeout=60), range(2))  # alone, either would wait until the barrier breaks


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_comes_out(threads: int) -> None:
    def fail(part: int) -> None:
        raise RuntimeError(f"part {part}")

    with pytest.raises(RuntimeError, match="part 0"):
        side_by_side(threads)(fail, range(3))


def test_threads_change_no_voxel() -> None:
    random = np.random.default_rng(0)
    image = random.normal(size=(30, 40, 50)).astype(np.float32)
    labels = random.choice(14, (20, 60, 60), p=[0.74] + [0.02] * 13).astype(np.uint8)
    found = []
    for each in (in_turn, side_by_side(3)):
        slabs = sliding_window(image, PATCH, 0.5, lambda window: np.stack([window, -window, window**2]), each=each)
        painted = labels_on_grid(slabs, len(image), (55, 71, 33), each)
        context = Context.of(make_bundle(organ_minima_mm3={"liver": 1e6, "spleen": 1.0}).plan, (1.0, 1.0, 1.0), each)
        found.append((painted, postprocess(labels, context)[0]))
    (one, ruled_by_one), (three, ruled_by_three) = found
    assert len(np.unique(one)) == 3
    assert (one == three).all()
    assert (ruled_by_one != labels).any()
    assert (ruled_by_one == ruled_by_three).all()


def test_a_cpu_engine_lends_its_threads_and_a_gpu_has_one() -> None:
    bundle = make_bundle()
    assert Segmenter(bundle, OpenVinoEngine(bundle, 1, "f32"))._each is in_turn
    assert Segmenter(bundle, OpenVinoEngine(bundle, 2, "f32"))._each is not in_turn
    pytest.importorskip("onnxruntime")
    assert Segmenter(bundle, OnnxRuntimeEngine(bundle, "f32", "CPUExecutionProvider"))._each is in_turn
