import math
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import save_nifti
from train import budget
from train.config import load_config
from train.dataset import Case

VOXELS = [125 * 320 * 320.0] * 2050


def test_the_papers_network_has_its_known_size() -> None:
    """ANCHORS of the project: 30.7 million parameters, 922 GFLOP per patch."""
    network = load_config().network
    assert budget.parameters(network, 14) == pytest.approx(30.7e6, rel=0.005)
    assert budget.flop(network, 14) == pytest.approx(922e9, rel=0.01)


def test_parameters_are_those_of_nnunets_network() -> None:
    pytest.importorskip("torch")
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from torch import nn

    settings = ["network.patch=[8, 16, 16]", "network.features=[4, 6, 10]", "network.kernels=[[1,3,3],[3,3,3],[3,3,3]]"]
    settings += ["network.strides=[[1,1,1],[1,2,2],[2,2,2]]", "network.encoder_convolutions=[1,2,3]"]
    network = load_config(settings=[*settings, "network.decoder_convolutions=[2,1]"]).network
    real = PlainConvUNet(
        1, 3, network.features, nn.Conv3d, network.kernels, network.strides, network.encoder_convolutions, 14,
        network.decoder_convolutions, True, nn.InstanceNorm3d, {"affine": True}, deep_supervision=True,
    )  # fmt: skip
    assert budget.parameters(network, 14) == sum(parameter.numel() for parameter in real.parameters())


def test_the_papers_run_takes_about_what_the_paper_says() -> None:
    """Section 4.4: roughly 40 GPU hours per model; table 2: 1000 hours in all. 4 x 5 + 1 models are 840 of them."""
    plan = budget.expected(VOXELS, 50, load_config())
    assert (plan.trainings, plan.labellings) == (21, 8000)
    assert 840 < plan.gpu_hours < 1000


def test_fewer_epochs_in_early_iterations_count() -> None:
    whole = budget.expected(VOXELS, 50, load_config()).training_flop
    short = budget.expected(VOXELS, 50, load_config(settings=["loop.epochs=[250, 500]"])).training_flop
    assert short / whole == pytest.approx((5 * (250 + 500 + 1000 + 1000) + 1000) / 21_000)


def test_mirroring_costs_eight_windows_for_one() -> None:
    once = budget.expected(VOXELS, 50, load_config()).labelling_flop
    assert budget.expected(VOXELS, 50, load_config(settings=["labelling.mirroring=true"])).labelling_flop == 8 * once


def test_auxiliary_classes_take_room_for_a_second_label_map_and_where_their_voxels_lie() -> None:
    plain = budget.expected(VOXELS, 50, load_config()).disk_bytes
    more = budget.expected(VOXELS, 50, load_config(settings=['data.auxiliary_classes=["bone", "lung"]'])).disk_bytes
    maps = 50 + 2000 * 4
    assert more - plain == pytest.approx(maps * (0.1 * VOXELS[0] + 2 * 320_000), rel=0.01)


def test_a_run_that_does_not_fit_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = budget.expected(VOXELS, 50, load_config())
    monkeypatch.setattr(budget, "free_bytes", lambda run: plan.disk_bytes - 1)
    with pytest.raises(budget.BudgetError, match="GB are free; expected enough"):
        plan.check_disk(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "done").write_bytes(b"12345")  # what is there already need not be written
    plan.check_disk(tmp_path / "run")


def test_a_file_with_two_names_takes_its_room_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"12345")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    assert budget.used_bytes(tmp_path) == 5


def test_scans_are_measured_by_their_headers_and_a_broken_one_counts_as_the_others(tmp_path: Path) -> None:
    scan = save_nifti(tmp_path / "A_0000.nii.gz", np.zeros((10, 20, 30), np.int16), (5.0, 1.0, 1.0))
    (tmp_path / "B_0000.nii.gz").write_bytes(b"no scan")
    cases = [Case("A", scan), Case("B", tmp_path / "B_0000.nii.gz")]
    volume = 10 * 20 * 30 * 5.0 / math.prod((4.0, 1.2, 1.2))
    assert budget.measure_scans(cases, load_config()) == pytest.approx([volume, volume])
