from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("nnunetv2")

from benchmarks.sides import WIDER, widened  # noqa: E402
from train.config import load_config  # noqa: E402
from train.nnunet import architecture  # noqa: E402


def unet(features: list[int]) -> Any:
    """nnU-Net's network of the paper's shape, with so many channels a stage."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    plan = architecture(load_config(None, [f"network.features={features}"]))
    kwargs, imports = plan["arch_kwargs"], plan["_kw_requires_import"]
    torch.manual_seed(1)
    network = get_network_from_plans(
        plan["network_class_name"], kwargs, imports, 1, 14, allow_init=True, deep_supervision=False
    )
    for values in network.parameters():  # norms and biases of a trained network are not all alike
        torch.nn.init.normal_(values, std=0.2)
    return network.eval()


def test_a_widened_network_is_the_same_function() -> None:
    features = [2, 3, 4, 5, 6, 7]
    narrow, wide = unet(features), unet([WIDER * width for width in features])
    image = torch.randn(1, 1, 16, 64, 64)
    with torch.no_grad():
        expected = narrow(image)
        assert (wide(image) - expected).abs().max() > 0.1 * expected.abs().max()
        wide.load_state_dict(widened(narrow.state_dict(), WIDER))
        assert (wide(image) - expected).abs().max() < 1e-4 * expected.abs().max()
