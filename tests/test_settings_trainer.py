import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from inference.bundle import read_bundle
from train import nnunet
from train.config import load_config
from train.export import fold_auxiliary, to_onnx
from train.intensities import IntensityError, intensities_of_training

ROOT = Path(__file__).resolve().parents[1]
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


def test_gentle_augmentation_bends_smoothly_and_scales_axes_apart(trainer: ModuleType) -> None:
    transform = SpatialTransform((32, 64, 96), 0, False, p_synchronize_scaling_across_axes=1)  # as nnU-Net sets it
    trainer.be_gentle(transform)
    bent, uneven = [], 0
    for seed in range(40):
        np.random.seed(seed)
        torch.manual_seed(seed)
        drawn = transform.get_parameters(image=torch.zeros((1, 36, 70, 100)))
        if drawn["elastic_offsets"] is not None:
            bent.append(drawn["elastic_offsets"].numpy())
        if drawn["affine"] is not None:
            scales = np.linalg.norm(drawn["affine"], axis=0)
            uneven += int(np.ptp(scales) > 0.02)
    assert 6 <= len(bent) <= 28
    assert uneven >= 3
    moved = np.array([np.abs(offsets).max((0, 1, 2)) for offsets in bent])  # voxels along z, y, x
    assert (moved.max(0) <= np.array(trainer.GENTLE_BEND) + 1e-4).all()
    assert (moved.max(0) > 0.6 * np.array(trainer.GENTLE_BEND)).all()
    for offsets in bent:
        assert max(float(np.abs(np.diff(offsets, axis=axis)).max()) for axis in (0, 1, 2)) < 1  # nothing folds


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
    Training.network = torch.nn.Conv3d(1, 2, (3, 5, 3))
    trainer.SettingsTrainer.load_initial_weights(Training(), path)
    rows = Training.network.weight.detach()
    assert bool((rows[:, :, :, 1:4] == 0.5).all())
    assert float(rows.sum()) == 0.5 * 2 * 27
    torch.save({"network_weights": {"weight": torch.zeros((3, 1, 3, 3, 3)), "bias": torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match="weights of another network"):
        trainer.SettingsTrainer.load_initial_weights(Training(), path)


class Net(torch.nn.Module):
    """Named as nnU-Net's: an encoder, and an output for each of two resolutions, the last one the finest."""

    def __init__(self, classes: int, width: int = 4, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__()
        self.encoder = torch.nn.Conv3d(1, width, kernel, padding=[size // 2 for size in kernel])
        self.decoder = torch.nn.Module()
        self.decoder.seg_layers = torch.nn.ModuleList(torch.nn.Conv3d(width, classes, 1) for _ in range(2))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.decoder.seg_layers[1](self.encoder(image))  # type: ignore[no-any-return]


@pytest.mark.parametrize("classes", [16, 14], ids=["all of its classes", "without the auxiliary ones"])
def test_a_training_starts_from_an_exported_network(trainer: ModuleType, tmp_path: Path, classes: int) -> None:
    exported, started = Net(16), Net(classes)
    path = tmp_path / "model.onnx"
    path.write_bytes(to_onnx(fold_auxiliary(exported), (4, 4, 4), half=True))
    coarse = started.decoder.seg_layers[0].weight.clone()
    trainer.load_exported(started, path)
    assert torch.equal(started.encoder.weight, exported.encoder.weight)
    assert torch.equal(started.decoder.seg_layers[1].weight, exported.decoder.seg_layers[1].weight[:classes])
    assert torch.equal(started.decoder.seg_layers[1].bias, exported.decoder.seg_layers[1].bias[:classes])
    assert torch.equal(started.decoder.seg_layers[0].weight, coarse)  # not in the file


def test_wider_kernels_begin_as_the_exported_ones_within_zeros(trainer: ModuleType, tmp_path: Path) -> None:
    exported, started = Net(16), Net(16, kernel=(3, 5, 7))
    path = tmp_path / "model.onnx"
    path.write_bytes(to_onnx(fold_auxiliary(exported), (4, 4, 4), half=True))
    trainer.load_exported(started, path)
    image = torch.randn(1, 1, 6, 8, 10)
    assert torch.allclose(started(image), exported(image), atol=1e-5)
    for narrower in ((3, 3, 1), (3, 4, 3)):
        with pytest.raises(RuntimeError, match=r"encoder.weight has shape \(4, 1, 3, 3, 3\)"):
            trainer.load_exported(Net(16, kernel=narrower), path)


def test_a_training_refuses_an_exported_network_of_another_size(trainer: ModuleType, tmp_path: Path) -> None:
    class Training:
        fold = "all"
        device = torch.device("cpu")
        network = Net(16, width=5)

    path = tmp_path / "model.onnx"
    path.write_bytes(to_onnx(fold_auxiliary(Net(16)), (4, 4, 4), half=False))
    before = Training.network.encoder.weight.clone()
    with pytest.raises(ValueError, match=r"model.onnx: weights of another network.*encoder.weight has shape \(4, "):
        trainer.SettingsTrainer.load_initial_weights(Training(), path)
    assert torch.equal(Training.network.encoder.weight, before)


def test_an_exported_network_must_have_all_stages_and_no_more(trainer: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(to_onnx(Net(16), (4, 4, 4), half=False))  # not folded: names without a prefix
    shallow = Net(16)
    del shallow.decoder.seg_layers[1]
    with pytest.raises(RuntimeError, match="it has more stages"):
        trainer.load_exported(shallow, path)
    deep = Net(16)
    deep.decoder.stages = torch.nn.Conv3d(4, 4, 1)
    with pytest.raises(RuntimeError, match=r"decoder\.stages\.weight is missing"):
        trainer.load_exported(deep, path)


def test_a_training_that_starts_from_the_shipped_weights_begins_with_their_output(trainer: ModuleType) -> None:
    config = load_config(ROOT / "train" / "wide.toml", [f"training.start_from={ROOT / 'weights'}"])
    plan = nnunet.architecture(config)
    network = get_network_from_plans(
        plan["network_class_name"], plan["arch_kwargs"], plan["_kw_requires_import"], 1, len(config.classes)
    )
    path = nnunet.start_file(config.training.start_from)
    trainer.load_exported(network, path)
    network.decoder.deep_supervision = False
    image = np.random.default_rng(0).standard_normal((1, 1, *read_bundle(ROOT / "weights").plan.patch))
    with torch.no_grad():
        found = fold_auxiliary(network)(torch.from_numpy(image.astype(np.float32))).numpy()
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    expected = session.run(["logits"], {"image": image.astype(np.float32)})[0]
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_bundle_to_start_from_must_be_whole(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "weights", tmp_path / "weights")
    (tmp_path / "weights" / "model.onnx").write_bytes(b"")
    with pytest.raises(nnunet.TrainingError, match=r"model\.onnx"):
        nnunet.start_file(str(tmp_path / "weights"))
    with pytest.raises(IntensityError, match=r"model\.onnx"):
        intensities_of_training(tmp_path / "weights")
    with pytest.raises(nnunet.TrainingError, match="expected a training's checkpoint or a bundle's folder"):
        nnunet.start_file(str(tmp_path / "nothing"))


def test_the_range_of_the_shipped_weights_goes_on() -> None:
    known = read_bundle(ROOT / "weights").plan.intensity
    found = intensities_of_training(ROOT / "weights")
    assert (found["percentile_00_5"], found["percentile_99_5"]) == (known.clip_low, known.clip_high)
    assert (found["mean"], found["std"]) == (known.mean, known.std)
