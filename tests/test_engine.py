import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from inference.bundle import Bundle, BundleError
from inference.engine import (
    Engine,
    EngineError,
    OnnxRuntimeEngine,
    OpenVinoEngine,
    Precision,
    _cgroup_quota,
    available_cores,
    load_engine,
    openvino_core,
)
from inference.resample import argmax
from tests.conftest import level_model, make_bundle, make_plan, u_net

WINDOW = np.random.default_rng(0).uniform(0, 13, (8, 16, 16)).astype(np.float32)


def openvino(bundle: Bundle) -> Engine:
    return OpenVinoEngine(bundle, 1, "f32")


def onnxruntime(bundle: Bundle) -> Engine:
    """The GPU engine's code on ONNX Runtime's CPU provider: the same path but for the device."""
    pytest.importorskip("onnxruntime")
    return OnnxRuntimeEngine(bundle, "f32", "CPUExecutionProvider")


def precision_of(engine: Engine) -> Any:
    """In what a network that was compiled computes, an OpenVINO type."""
    return engine._compiled.get_property("INFERENCE_PRECISION_HINT")


both = pytest.mark.parametrize("load", [openvino, onnxruntime])


@both
@pytest.mark.parametrize(
    "model",
    [
        level_model(),
        level_model(shape=(1, 1, 8, 16, 16)),
        level_model(shape=("batch", 1, 8, 16, 16), names=("input", "output")),
        level_model(names=("x:0", "some/long/name"), opset=11),
        level_model(half=True),
    ],
    ids=["open", "fixed", "open batch", "odd names, old opset", "float16"],
)
def test_an_engine_runs_any_network_that_fits(load, model: bytes) -> None:
    engine = load(make_bundle(model))
    logits = engine(WINDOW)
    assert logits.shape == (14, 8, 16, 16)
    assert logits.dtype == np.float32
    clear = np.abs(WINDOW - np.rint(WINDOW)) < 0.4
    assert (argmax(logits) == np.rint(WINDOW))[clear].all()


def test_an_engine_that_gave_its_memory_back_works_again() -> None:
    engine = OpenVinoEngine(make_bundle(), 1, "f32")
    first = engine(WINDOW).copy()
    for _ in range(2):
        engine.release()
        np.testing.assert_array_equal(engine(WINDOW), first)


def test_a_u_net_takes_larger_windows_by_its_unit_and_the_patch_again() -> None:
    engine = OpenVinoEngine(make_bundle(u_net()), 1, "f32")
    assert engine.unit == (2, 4, 4)
    first = engine(WINDOW).copy()
    wide = np.random.default_rng(1).normal(size=(10, 20, 24)).astype(np.float32)
    assert engine(wide).shape == (14, 10, 20, 24)
    exact = OpenVinoEngine(make_bundle(u_net(), patch=(10, 20, 24)), 1, "f32")
    np.testing.assert_array_equal(engine(wide), exact(wide))
    np.testing.assert_array_equal(engine(WINDOW), first)


def test_windows_grow_until_the_largest_layer_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = 14 * 8 * 16 * 16 * 4
    grown = {}
    for room in (0.5, 1.5, 3):
        monkeypatch.setattr("inference.engine.LARGEST_LAYER", room * layer)
        grown[room] = OpenVinoEngine(make_bundle(u_net()), 1, "f32").growth
    assert grown == {0.5: 1, 1.5: 1.5, 3: 2}


def test_growth_knows_in_what_this_cpu_will_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OpenVinoEngine(make_bundle(u_net()), 1)
    engine(WINDOW)
    monkeypatch.setattr("inference.engine.LARGEST_LAYER", 1.5 * 14 * 8 * 16 * 16 * precision_of(engine).size)
    assert OpenVinoEngine(make_bundle(u_net()), 1).growth == 1.5


def test_layers_of_bfloat16_are_half_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def get_property(self, device: str, name: str) -> object:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return ["FP32", "BF16", "INT8"]

        def __getattr__(self, name: str) -> object:
            return getattr(openvino_core(), name)

    monkeypatch.setattr("inference.engine.openvino_core", Core)
    monkeypatch.setattr("inference.engine.LARGEST_LAYER", 1.5 * 14 * 8 * 16 * 16 * 2)
    assert OpenVinoEngine(make_bundle(u_net()), 1).growth == 1.5
    assert OpenVinoEngine(make_bundle(u_net()), 1, "f32").growth == 1


@both
def test_logits_outlive_the_next_window(load) -> None:
    engine = load(make_bundle())
    first = engine(WINDOW)
    before = first.copy()
    assert (engine(WINDOW + 1) != before).any()
    np.testing.assert_array_equal(first, before)


def test_a_size_that_a_network_cannot_take_is_named_and_the_next_window_works() -> None:
    engine = OpenVinoEngine(make_bundle(u_net()), 1, "f32")
    first = engine(WINDOW).copy()
    with pytest.raises(EngineError, match=r"no window of \(8, 17, 16\)"):
        engine(np.zeros((8, 17, 16), np.float32))
    np.testing.assert_array_equal(engine(WINDOW), first)


def test_a_u_net_whose_output_does_not_grow_keeps_to_the_patch() -> None:
    model = onnx.load_from_string(u_net())
    model.graph.node[-1].output[0] = "grown"
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 14, 8, 16, 16]), "patch"))
    model.graph.node.append(helper.make_node("Reshape", ["grown", "patch"], ["output"]))
    engine = OpenVinoEngine(make_bundle(model.SerializeToString()), 1, "f32")
    assert engine.unit is None
    assert (engine(WINDOW) == OpenVinoEngine(make_bundle(u_net()), 1, "f32")(WINDOW)).all()


@both
def test_windows_of_other_networks_and_on_a_gpu_are_the_patch(load) -> None:
    assert load(make_bundle()).unit is None


def test_both_engines_give_the_same_logits() -> None:
    pytest.importorskip("onnxruntime")
    first, second = openvino(make_bundle())(WINDOW).copy(), onnxruntime(make_bundle())(WINDOW)
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-3)


@both
def test_a_network_that_does_not_fit_its_plan_is_refused(load) -> None:
    fixed = level_model(shape=(1, 1, 8, 16, 16))
    for bundle, reason in (
        (make_bundle(fixed, patch=(8, 16, 24)), "input of 1 x 1 x 8 x 16 x 16; the plan expects 1 x 1 x 8 x 16 x 24"),
        (make_bundle(level_model(9)), "expects 1 x 14 x 8 x 16 x 16"),
        (make_bundle(level_model(shape=("N", 2, "z", "y", "x"))), "refuses|input of"),
    ):
        with pytest.raises(BundleError, match=reason):
            load(bundle)(WINDOW)


@both
def test_a_file_that_is_no_network_is_refused(load) -> None:
    with pytest.raises(BundleError, match=r"model.onnx: .* refuses the network"):
        load(Bundle(make_plan(b"no network"), b"no network"))


def test_a_gpu_that_is_not_there_is_said_not_to_be() -> None:
    pytest.importorskip("onnxruntime")
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="no GPU"):
        load_engine(make_bundle(), "cuda")
    assert load_engine(make_bundle(), "auto", 1).name == "OpenVINO, CPU, 1 thread"


@pytest.mark.parametrize(
    ("planned", "asked", "taken"),
    [
        ("float32", "auto", "f32"),
        ("float32", "bf16", "bf16"),
        ("bfloat16", "auto", "auto"),
        ("bfloat16", "f32", "f32"),
    ],
)
def test_the_bundle_says_in_what_it_is_computed_unless_the_command_does(
    monkeypatch: pytest.MonkeyPatch, planned: str, asked: Precision, taken: str
) -> None:
    bundle = make_bundle(precision=planned)
    monkeypatch.setattr("inference.engine.OpenVinoEngine", lambda bundle, threads, precision: f"CPU {precision}")
    monkeypatch.setattr("inference.engine.OnnxRuntimeEngine", lambda bundle, precision: f"GPU {precision}")
    assert load_engine(bundle, "cpu", 1, asked) == f"CPU {taken}"
    assert load_engine(bundle, "cuda", 1, asked) == f"GPU {taken}"


def test_float32_is_what_the_engine_computes_in() -> None:
    engine = load_engine(make_bundle(precision="float32"), "cpu", 1)
    engine(WINDOW)
    assert precision_of(engine).get_type_name() == "f32"


def test_the_cores_of_a_container_are_its_quota(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert _cgroup_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert _cgroup_quota(tmp_path) is None
    old = tmp_path / "old"
    (old / "cpu").mkdir(parents=True)
    (old / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    (old / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert _cgroup_quota(old) == 1.0
    (old / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert _cgroup_quota(old) is None
    assert _cgroup_quota(tmp_path / "none") is None
    assert available_cores() >= 1


def test_an_image_with_neither_gpu_nor_cpu_engine_says_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.engine.cuda_available", lambda: False)
    monkeypatch.setitem(sys.modules, "openvino", None)  # what `import` finds where it is not installed
    monkeypatch.setattr("inference.engine.openvino_core", openvino_core.__wrapped__)  # as if none were made yet
    with pytest.raises(EngineError, match=r"no GPU was found .* OpenVINO is not installed"):
        load_engine(make_bundle(), "auto")
    with pytest.raises(EngineError, match=r"^device cpu: OpenVINO is not installed"):
        load_engine(make_bundle(), "cpu")


def test_ctrl_c_after_two_engines_have_come_and_gone_is_no_segmentation_fault() -> None:
    code = """if True:
        import os, signal
        from inference.engine import OpenVinoEngine
        from tests.conftest import make_bundle
        signal.signal(signal.SIGINT, signal.default_int_handler)
        first, second = (OpenVinoEngine(make_bundle(), 1, "f32") for _ in range(2))
        del first
        del second
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            print("interrupted")
    """
    root = Path(__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr
