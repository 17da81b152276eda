from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

PATCH = (12, 40, 48)


def labels() -> torch.Tensor:
    """(1, z, y, x): a block of label 7 in the middle, 19 beside it."""
    seg = torch.zeros((1, 14, 48, 58), dtype=torch.int16)
    seg[:, 3:11, 12:36, 15:30] = 7
    seg[:, 3:11, 12:36, 30:45] = 19
    return seg


def test_gentle_augmentation_moves_bodies_a_little_and_invents_no_label(trainer: ModuleType) -> None:
    transform = SpatialTransform(
        PATCH, 0, False, p_rotation=0.2, p_scaling=0.2, border_mode_seg="constant", padding_value_seg=-1
    )
    trainer.be_gentle(transform)
    seg = labels()
    whole = int((seg == 7).sum())
    sizes = set()
    for seed in range(12):
        np.random.seed(seed)
        torch.manual_seed(seed)
        moved = transform(image=seg.float(), segmentation=seg)["segmentation"]
        assert tuple(moved.shape[1:]) == PATCH
        assert set(moved.unique().tolist()) <= {-1, 0, 7, 19}
        sizes.add(int((moved == 7).sum()))
    largest, smallest = trainer.GENTLE_SCALING[1] ** -3, trainer.GENTLE_SCALING[0] ** -3
    assert len(sizes) > 3
    assert whole * largest * 0.85 <= min(sizes)
    assert max(sizes) <= whole * smallest * 1.15


@pytest.mark.parametrize(("precision", "wanted"), [("bfloat16", True), ("float32", False)], ids=["bfloat16", "float32"])
def test_the_arithmetic_of_a_cpu_can_be_chosen(trainer: ModuleType, precision: str, wanted: bool) -> None:
    assert trainer.wants_bfloat16(precision) is wanted


def test_random_states_differ_between_folds_and_epochs_but_not_between_runs(trainer: ModuleType) -> None:
    def draw(fold: int | str, epoch: int) -> tuple[float, float]:
        trainer.seed_everything(3, fold, epoch)
        return float(np.random.random()), float(torch.rand(1))

    assert draw(0, 1) == draw(0, 1)
    assert len({draw(0, 1), draw(1, 1), draw(0, 2), draw("all", 1)}) == 4


def test_a_training_starts_from_a_checkpoint_and_refuses_another_networks(trainer: ModuleType, tmp_path: Path) -> None:
    class Training:
        fold = "all"
        device = torch.device("cpu")
        network = torch.nn.Conv3d(1, 2, 3)

    path = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": {"weight": torch.full((2, 1, 3, 3, 3), 0.5), "bias": torch.zeros(2)}}, path)
    trainer.SettingsTrainer.load_initial_weights(Training(), path)
    assert float(Training.network.weight.detach().mean()) == 0.5
    torch.save({"network_weights": {"weight": torch.zeros((3, 1, 3, 3, 3)), "bias": torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match="weights of another network"):
        trainer.SettingsTrainer.load_initial_weights(Training(), path)
