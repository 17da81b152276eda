from pathlib import Path

import numpy as np
import openvino
import pytest
from openvino import opset13 as opset

from inference.bundle import read_bundle
from inference.engine import load_engine, openvino_core
from inference.precision import in_two_parts, widen_head, widen_input
from tests.conftest import u_net

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
WINDOW = (16, 32, 48)
PLAIN = ([1, 1, 1],) * 4  # strides, pads and dilations of a convolution that keeps the size


def shipped() -> openvino.Model:
    model = openvino_core().read_model(read_bundle(WEIGHTS).model)
    model.reshape([1, 1, *WINDOW])
    return model


def picture() -> np.ndarray:
    return np.random.default_rng(0).normal(size=WINDOW).astype(np.float32)


def answer(model: openvino.Model, precision: str, image: np.ndarray | None = None) -> np.ndarray:
    image = picture()[None, None] if image is None else image[None]
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


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_two_parts_make_the_image_again_and_bfloat16_loses_little_of_them(scale: float) -> None:
    image = picture() * np.float32(scale)
    high, low = in_two_parts(image)
    np.testing.assert_array_equal(high + low, image)
    assert not (high.view(np.uint32) & 0xFFFF).any()
    rounded = high + (low.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    np.testing.assert_allclose(rounded, image, rtol=2**-14)


def test_a_network_answers_the_same_to_an_image_in_two_parts() -> None:
    model = shipped()
    assert widen_input(model)
    expected = answer(shipped(), "f32")
    found = answer(model, "f32", in_two_parts(picture()))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    model.reshape([1, 2, 32, 32, 32])  # and windows of other sizes


@bfloat16
def test_tissues_that_are_one_in_bfloat16_stay_two_in_two_parts() -> None:
    """A convolution that sees steps along z, of 3 thousandths of a standard deviation."""
    kernel = np.zeros((1, 1, 3, 3, 3), np.float32)
    kernel[0, 0, :2, 1, 1] = -1, 1
    image = np.ones(WINDOW, np.float32)
    image[8:] += np.float32(0.003)
    answers = []
    for wide in (False, True):
        port = opset.parameter([1, 1, *WINDOW], np.float32)
        model = openvino.Model([opset.convolution(port, opset.constant(kernel), *PLAIN)], [port])
        assert not wide or widen_input(model)
        answers.append(answer(model, "bf16", in_two_parts(image) if wide else image[None])[0, 0, 8, 16, 24])
    assert abs(answers[0] - 0.003) > 0.002
    assert answers[1] == pytest.approx(0.003, rel=0.01)


@bfloat16
def test_the_engine_gives_the_image_in_two_parts_in_bfloat16() -> None:
    bundle = read_bundle(WEIGHTS)
    engine = load_engine(bundle, "cpu", 1, "bf16")
    image = np.ones(bundle.plan.patch, np.float32)
    image[:, 40:80, 40:80] += np.float32(0.003)  # nothing in eight bits
    plain = engine(np.ones(bundle.plan.patch, np.float32))
    assert (engine(image) != plain).any()


def test_an_image_that_more_than_a_convolution_reads_stays_whole() -> None:
    image = opset.parameter([1, 1, *WINDOW], np.float32)
    kernel = opset.constant(np.ones((1, 1, 3, 3, 3), np.float32))
    convolution = opset.convolution(image, kernel, *PLAIN)
    assert not widen_input(openvino.Model([opset.add(convolution, image)], [image]))
    assert widen_input(openvino.Model([opset.relu(convolution)], [image]))
