"""The mean of several bundles: its weights, its plan, what it refuses."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from inference.bundle import Bundle, BundleError, read_bundle, write_bundle
from tests.conftest import level_model, make_bundle, u_net
from train.__main__ import main
from train.average import average


def weights_of(model: bytes) -> dict[str, np.ndarray]:
    tensors = onnx.load_from_string(model).graph.initializer
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}


def times(model: bytes, factor: float) -> bytes:
    """The same network, its weights times ``factor``."""
    changed = onnx.load_from_string(model)
    for tensor in changed.graph.initializer:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), tensor.name))
    content: bytes = changed.SerializeToString()
    return content


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_the_mean_of_weights_keeps_the_last_plan_and_names_its_networks(tmp_path: Path, half: bool) -> None:
    model = level_model(half=half)
    bundles = [
        make_bundle(model, organ_minima_mm3={"liver": 5.0}),
        make_bundle(times(model, 3), organ_minima_mm3={"liver": 7.0}, provenance={"cases": 4}),
    ]
    for name, bundle in zip("ab", bundles, strict=True):
        write_bundle(tmp_path / name, bundle)
    out = tmp_path / "mean"
    assert main(["average", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    mean = read_bundle(out)  # checks the hash
    found, expected = weights_of(mean.model), weights_of(times(model, 2))
    assert {name: values.dtype for name, values in found.items()} == {n: v.dtype for n, v in expected.items()}
    assert all(np.allclose(found[name], expected[name], 1e-3) for name in expected)
    assert mean.plan.organ_minima_mm3 == {"liver": 7.0}
    assert mean.plan.provenance == {"cases": 4, "mean_of": [bundle.plan.model.sha256 for bundle in bundles]}


def test_a_mean_rounded_to_bfloat16_is_held_by_it() -> None:
    model = level_model(half=True)
    bundles = [make_bundle(times(model, factor)) for factor in (1, 1.37)]
    plain, rounded = (weights_of(average(bundles, bfloat16=wanted).model) for wanted in (False, True))
    half = [name for name, values in plain.items() if values.dtype == np.float16]
    held = {name: torch.from_numpy(rounded[name].copy()).bfloat16().half().numpy() for name in half}
    assert half
    assert all(np.array_equal(held[name], rounded[name]) for name in half)
    assert any((plain[name] != rounded[name]).any() for name in half)
    assert all(np.allclose(plain[name], rounded[name], 4e-3) for name in half)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_bundle(spacing=(4.0, 2.0, 3.0)), r"bundle 1: spacing is \(4.0, 2.0, 3.0\); expected the last one's"),
        (make_bundle(anti_aliasing=True), "bundle 1: anti_aliasing is True; expected the last one's, False"),
        (make_bundle(u_net()), "bundle 1: another network than the last one's; weights differ in "),
    ],
    ids=["another grid", "other means", "another network"],
)
def test_networks_of_two_kinds_have_no_mean(other: Bundle, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        average([other, make_bundle()])


def test_networks_on_two_grids_have_a_mean_where_it_is_asked_for(tmp_path: Path) -> None:
    for name, spacing in (("a", (4.0, 2.0, 3.0)), ("b", (4.0, 2.0, 2.0))):
        write_bundle(tmp_path / name, make_bundle(spacing=spacing))
    words = ["average", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "mean")]
    assert main(words) == 1
    assert main([*words, "--across-grids"]) == 0
    assert read_bundle(tmp_path / "mean").plan.spacing == (4.0, 2.0, 2.0)


def test_narrower_kernels_count_as_zero_around() -> None:
    last = make_bundle(u_net())
    narrow = onnx.load_from_string(last.model)
    cut = [tensor for tensor in narrow.graph.initializer if list(tensor.dims[2:]) == [3, 3, 3]]
    for tensor in cut:
        middle = numpy_helper.to_array(tensor)[:, :, :, 1:2, 1:2]
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(middle), tensor.name))
    found = weights_of(average([make_bundle(narrow.SerializeToString()), last]).model)
    for tensor in cut:
        values = weights_of(last.model)[tensor.name]
        inner = np.zeros_like(values)
        inner[:, :, :, 1, 1] = values[:, :, :, 1, 1]
        assert np.allclose(found[tensor.name], (values + inner) / 2, 1e-3)
    assert cut


def test_a_bundle_that_is_not_there_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["average", str(tmp_path / "none"), "--out", str(tmp_path / "mean")]) == 1
    assert str(tmp_path / "none") in caplog.text
    assert not (tmp_path / "mean").exists()
