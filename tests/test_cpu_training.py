import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

FOLDER = Path(__file__).parents[1] / "train" / "trainer"
CLASSES = 5


@pytest.fixture(scope="module")
def cpu_training() -> ModuleType:
    """The file, imported as nnU-Net imports it: on its own."""
    spec = importlib.util.spec_from_file_location("cpu_training_under_test", FOLDER / "cpu_training.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(program: str) -> str:
    """What a Python process prints that has the trainer's folder on its path."""
    environment = os.environ | {"PYTHONPATH": str(FOLDER)}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    ).stdout


def example(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that ask for a gradient and labels, of which class 3 is in no sample."""
    random = torch.Generator().manual_seed(7)
    logits = torch.randn((batch, CLASSES, 4, 6, 5), generator=random).to(memory_format=torch.channels_last_3d)
    labels = torch.randint(0, 3, (batch, 1, 4, 6, 5), generator=random).float()
    labels[labels == 2] = 4
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("batch_dice", [False, True], ids=["dice of each sample", "dice of the batch"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_loss_in_one_pass_is_nnunets_and_so_is_its_gradient(
    cpu_training: ModuleType, batch: int, batch_dice: bool
) -> None:
    theirs = DC_and_CE_loss(
        {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False},
        {},
        dice_class=MemoryEfficientSoftDiceLoss,
    )
    logits, labels = example(batch)
    expected = theirs(logits, labels)
    (expected_gradient,) = torch.autograd.grad(3 * expected, logits)
    found = cpu_training.DiceAndCrossEntropy(batch_dice, 1e-5)(logits, labels)
    (gradient,) = torch.autograd.grad(3 * found, logits)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-9)


def test_the_loss_of_bfloat16_is_taken_in_float32(cpu_training: ModuleType) -> None:
    logits, labels = example(2)
    rounded = logits.detach().bfloat16().requires_grad_()
    loss = cpu_training.DiceAndCrossEntropy(False, 1e-5)
    found = loss(rounded, labels)
    found.backward()
    assert found.dtype == torch.float32
    assert found.item() == loss(rounded.detach().float(), labels).item()
    assert rounded.grad is not None
    assert rounded.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("batch", [1, 2])
def test_norms_that_keep_channels_last_are_instance_norms(cpu_training: ModuleType, batch: int) -> None:
    torch.manual_seed(3)
    network = nn.Sequential(nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU())
    nn.init.normal_(network[0].weight)
    nn.init.normal_(network[0].bias)
    scan = torch.randn(batch, 8, 6, 8, 8)
    expected = network(scan)
    weights = dict(network.state_dict())
    cpu_training.keep_channels_last(network)
    found = network(scan.to(memory_format=torch.channels_last_3d))
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert network.state_dict().keys() == weights.keys()


@pytest.mark.parametrize(("depth", "precision"), [(1, torch.bfloat16), (2, torch.float32), (3, torch.bfloat16)])
def test_two_slices_are_convolved_in_float32(cpu_training: ModuleType, depth: int, precision: torch.dtype) -> None:
    """In bfloat16 their gradient holds whatever lay in memory before."""
    network = nn.Sequential(nn.Conv3d(8, 8, 3, padding=1))
    scan = torch.randn(1, 8, depth, 3, 4)
    (expected,) = torch.autograd.grad(network(scan).square().sum(), network[0].weight)
    cpu_training.keep_channels_last(network)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(scan)
    (gradient,) = torch.autograd.grad(found.float().square().sum(), network[0].weight)
    assert found.dtype == precision
    assert (gradient - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_norm_with_running_statistics_stays_as_it_is(cpu_training: ModuleType) -> None:
    network = nn.Sequential(nn.InstanceNorm3d(4, track_running_stats=True))
    cpu_training.keep_channels_last(network)
    assert type(network[0]) is nn.InstanceNorm3d


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the setting is glibc's")
def test_freed_memory_is_kept_for_the_next_iteration() -> None:
    faults = """
import resource, torch
from cpu_training import keep_freed_memory
{setting}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def iteration():
    torch.ones(40 * 2**20, dtype=torch.uint8) + 1
for _ in range(12):
    iteration()
before = faults()
for _ in range(5):
    iteration()
print(faults() - before)
"""
    returned = int(printed(faults.format(setting="")))
    kept = int(printed(faults.format(setting="keep_freed_memory()")))
    assert kept * 10 < returned
