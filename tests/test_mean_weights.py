import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def mean_weights() -> ModuleType:
    """The file, imported as nnU-Net imports it: on its own."""
    path = Path(__file__).parents[1] / "train" / "trainer" / "mean_weights.py"
    spec = importlib.util.spec_from_file_location("mean_weights_under_test", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(value: float) -> torch.nn.Module:
    made = torch.nn.Conv3d(1, 2, 1)
    torch.nn.init.constant_(made.weight, value)
    torch.nn.init.constant_(made.bias, -value)
    return made


def test_every_iteration_counts_alike(mean_weights: ModuleType) -> None:
    mean = mean_weights.MeanWeights()
    for value in (1.0, 2.0, 6.0, 7.0):
        mean.add(network(value))
    found = network(0.0)
    mean.install(found)
    assert torch.allclose(found.weight, torch.full_like(found.weight, 4.0))
    assert torch.allclose(found.bias, torch.full_like(found.bias, -4.0))


def test_the_mean_does_not_follow_a_network_that_was_counted(mean_weights: ModuleType) -> None:
    mean, counted = mean_weights.MeanWeights(), network(1.0)
    mean.add(counted)
    torch.nn.init.constant_(counted.weight, 9.0)
    mean.install(counted)
    assert torch.equal(counted.weight, network(1.0).weight)


def test_a_mean_goes_on_from_its_state(mean_weights: ModuleType) -> None:
    first, second = mean_weights.MeanWeights(), mean_weights.MeanWeights()
    for value in (1.0, 2.0):
        first.add(network(value))
    second.load_state_dict(first.state_dict())
    second.add(network(9.0))
    found = network(0.0)
    second.install(found)
    assert torch.allclose(found.weight, torch.full_like(found.weight, 4.0))


def test_without_an_iteration_the_weights_stay(mean_weights: ModuleType) -> None:
    mean, found = mean_weights.MeanWeights(), network(3.0)
    mean.load_state_dict({})
    mean.install(found)
    assert torch.equal(found.weight, network(3.0).weight)
