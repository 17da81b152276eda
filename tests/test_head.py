from pathlib import Path

import numpy as np
import openvino
import pytest

from inference.bundle import read_bundle
from inference.engine import load_engine, openvino_core
from inference.head import widen_head
from tests.conftest import u_net

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
WINDOW = (16, 32, 48)


def shipped() -> openvino.Model:
    model = openvino_core().read_model(read_bundle(WEIGHTS).model)
    model.reshape([1, 1, *WINDOW])
    return model


def answer(model: openvino.Model, precision: str) -> np.ndarray:
    image = np.random.default_rng(0).normal(size=(1, 1, *WINDOW)).astype(np.float32)
    return np.array(openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})([image])[0])


def test_a_transposed_convolution_of_one_voxel_answers_as_the_convolution() -> None:
    model = shipped()
    assert widen_head(model)
    expected = answer(shipped(), "f32")
    np.testing.assert_allclose(answer(model, "f32"), expected, atol=1e-5 * np.abs(expected).max())


bfloat16 = pytest.mark.skipif(
    "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="this CPU has no bfloat16"
)


@bfloat16
def test_logits_of_a_network_in_bfloat16_are_finer_than_bfloat16() -> None:
    model, exact = shipped(), answer(shipped(), "f32")
    widen_head(model)
    coarse, fine = answer(shipped(), "bf16"), answer(model, "bf16")
    assert not (coarse.view(np.uint32) & 0xFFFF).any()
    assert np.mean(fine.view(np.uint32) & 0xFFFF != 0) > 0.9
    assert np.abs(fine - exact).mean() < np.abs(coarse - exact).mean()


@bfloat16
def test_the_engine_widens_the_head_in_bfloat16() -> None:
    bundle = read_bundle(WEIGHTS)
    logits = load_engine(bundle, "cpu", 1, "bf16")(np.random.default_rng(0).normal(size=bundle.plan.patch))
    assert np.mean(logits.view(np.uint32) & 0xFFFF != 0) > 0.9


def test_a_kernel_of_more_than_a_voxel_stays() -> None:
    assert not widen_head(openvino_core().read_model(u_net()))
