from pathlib import Path

import numpy as np
import openvino
import pytest

from inference import skips
from inference.bundle import read_bundle
from inference.engine import openvino_core
from inference.skips import compose, take_apart
from tests.conftest import level_model, u_net

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


def read(content: bytes, window: tuple[int, int, int]) -> openvino.Model:
    model = openvino_core().read_model(content)
    model.reshape([1, 1, *window])
    return model


def answer(model: openvino.Model) -> np.ndarray:
    image = np.random.default_rng(0).normal(size=tuple(model.input(0).shape))
    feed = image.astype(model.input(0).get_element_type().to_dtype())
    found = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([feed])[0]
    return np.asarray(found, np.float32)


def joined(model: openvino.Model) -> int:
    """Convolutions over concatenated channels."""
    return sum(
        node.get_type_name() == "Convolution" and node.input_value(0).get_node().get_type_name() == "Concat"
        for node in model.get_ops()
    )


def enlarged(model: openvino.Model) -> list[int]:
    """Channels of what transposed convolutions give."""
    return [
        node.output(0).get_shape()[1] for node in model.get_ops() if node.get_type_name() == "ConvolutionBackpropData"
    ]


@pytest.mark.parametrize(
    ("content", "window", "expected"),
    [(u_net(), (8, 16, 16), 1), (read_bundle(WEIGHTS).model, (16, 32, 48), 4), (level_model(), (8, 16, 16), 0)],
    ids=["three parts", "shipped, float16 weights", "no skip"],
)
def test_a_network_without_concatenations_answers_as_before(content: bytes, window: tuple, expected: int) -> None:
    before, after = read(content, window), read(content, window)
    there = joined(after)
    assert take_apart(after) == expected
    assert joined(after) == there - expected
    first, second = answer(before), answer(after)
    assert second.shape == first.shape
    np.testing.assert_allclose(second, first, atol=1e-5 * np.abs(first).max())


def test_what_a_transposed_convolution_enlarged_never_exists() -> None:
    model = read(u_net(), (8, 16, 16))
    assert enlarged(model) == [3]
    take_apart(model)
    assert enlarged(model) == [14]


def test_a_composed_kernel_does_what_both_do() -> None:
    r = np.random.default_rng(0)
    coarse, enlarging, kernel = r.normal(size=5), r.normal(size=(1, 1, 1, 1, 2)), r.normal(size=(1, 1, 1, 1, 3))
    fine = np.outer(coarse, enlarging.ravel()).ravel()
    expected = np.convolve(fine, kernel.ravel()[::-1])  # with two voxels more at either end
    spread = np.zeros(9)
    spread[::2] = coarse
    np.testing.assert_allclose(np.convolve(spread, compose(enlarging, kernel).ravel()), expected)


def test_heavy_convolutions_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = read(u_net(), (8, 16, 16))
    monkeypatch.setattr(skips, "LIGHT", 100)
    assert take_apart(model) == 0
    assert joined(model) == 1


def test_it_still_takes_windows_of_other_sizes() -> None:
    model = read(u_net(), (8, 16, 16))
    take_apart(model)
    model.reshape([1, 1, 8, 20, 24])
    expected = answer(read(u_net(), (8, 20, 24)))
    np.testing.assert_allclose(answer(model), expected, atol=1e-5 * np.abs(expected).max())
