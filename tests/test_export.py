from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from train import export  # noqa: E402

PATCH = (4, 8, 8)


def network(classes: int) -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Conv3d(1, 32, 3, padding=1), torch.nn.InstanceNorm3d(32, affine=True), torch.nn.LeakyReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Conv3d(32, 32, 3, padding=1), torch.nn.Conv3d(32, classes, 1)).eval()


def run_onnx(model: bytes, image: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: image})[0]
    return found


def random_image(batch: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((batch, 1, *PATCH)).astype(np.float32)


def test_an_organ_wins_a_voxel_exactly_where_it_wins_among_all_classes() -> None:
    net, image = network(20), random_image(2)
    found = run_onnx(export.to_onnx(export.fold_auxiliary(net), PATCH, half=False), image)
    assert found.shape == (2, 14, *PATCH)
    everything = net(torch.from_numpy(image)).detach().numpy().argmax(1)
    assert (found.argmax(1) == np.where(everything < 14, everything, 0)).all()
    assert (everything >= 14).any()


def test_half_weights_shrink_the_file_and_hardly_change_the_logits() -> None:
    net, image = network(14), random_image(1)
    whole, half = export.to_onnx(net, PATCH, half=False), export.to_onnx(net, PATCH, half=True)
    assert len(half) < 0.6 * len(whole)
    expected, found = run_onnx(whole, image), run_onnx(half, image)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()
    assert np.abs(found - expected).max() > 0


def test_the_comparison_sees_another_network() -> None:
    net = network(14)
    model = export.to_onnx(net, PATCH, half=False)
    assert export._compare(model, net, PATCH) < export.TOLERANCE
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0, 0] += 1
    assert export._compare(model, net, PATCH) > export.TOLERANCE


@pytest.mark.parametrize(("kind", "most"), [("float16", 5e-3), ("bfloat16", 4e-2)])
def test_the_file_equals_torch_on_rounded_weights(kind: str, most: float) -> None:
    net = network(14)
    change = export._round_weights(net, PATCH, kind)
    assert most / 100 < change < most
    assert export._compare(export.to_onnx(net, PATCH, half=True), net, PATCH) < export.TOLERANCE


def test_weights_rounded_to_bfloat16_lose_nothing_in_it() -> None:
    net = network(14)
    export._round_weights(net, PATCH, "bfloat16")
    weight = next(p for p in net.parameters() if p.numel() >= export.SMALL_TENSOR).detach()
    normal = weight[weight.abs() > 1e-4]  # smaller ones are fewer bits of float16
    assert normal.numel() > 0.9 * weight.numel()
    assert torch.equal(normal.bfloat16().float(), normal)


def test_a_fold_is_all_or_a_number() -> None:
    assert export.parse_fold("all") == "all"
    assert export.parse_fold("3") == 3
    with pytest.raises(export.ExportError, match="--fold"):
        export.parse_fold("first")
