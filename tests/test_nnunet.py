import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from inference.bundle import read_bundle
from inference.organs import CLASSES, ORGANS
from inference.volume import write_volume
from train.intensities import read_intensities
from train.nnunet import deal_folds
from train.workspace import LABELLED_DATASET, Workspace


def test_every_case_is_validated_once_and_never_where_it_trains() -> None:
    labelled, pseudo = [f"L{i}" for i in range(11)], [f"P{i}" for i in range(7)]
    splits = deal_folds(labelled, pseudo, 5, seed=1)
    assert sorted(case for split in splits for case in split.val) == sorted(labelled)
    for split in splits:
        assert not set(split.train) & set(split.val)
    held = [set(labelled + pseudo) - set(split.train) for split in splits]
    assert sorted(case for fold in held for case in fold) == sorted(labelled + pseudo)


def test_a_labelled_case_keeps_its_fold_when_pseudo_labels_come() -> None:
    labelled = [f"L{i}" for i in range(10)]
    before, after = deal_folds(labelled, [], 5, 0), deal_folds(labelled[::-1], ["P1", "P2"], 5, 0)
    assert [split.val for split in before] == [split.val for split in after]


def write_toy_dataset(root: Path, cases: int) -> None:
    """Thirteen blocks, each at an intensity of its own, and bone as an auxiliary class."""
    random = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr", "auxiliaryTr"):
        (root / folder).mkdir(parents=True)
    affine = np.diag([-4.0, -4.0, 4.0, 1.0])
    for index in range(cases):
        voxels, labels = random.normal(-100, 20, (16, 36, 36)), np.zeros((16, 36, 36), np.uint8)
        for organ in ORGANS:
            y, x = 2 + 8 * ((organ.id - 1) // 4), 2 + 8 * ((organ.id - 1) % 4)
            labels[4:12, y : y + 6, x : x + 6] = organ.id
        voxels[labels > 0] = 30.0 * labels[labels > 0]
        auxiliary = labels.copy()
        auxiliary[:, :2] = 14
        write_volume(root / "imagesTr" / f"T{index}_0000.nii.gz", voxels.astype(np.int16), affine)
        write_volume(root / "labelsTr" / f"T{index}.nii.gz", labels, affine)
        write_volume(root / "auxiliaryTr" / f"T{index}.nii.gz", auxiliary, affine)


SETTINGS = [
    'data.auxiliary_classes=["bone"]',
    "prepare.spacing=[4.0, 4.0, 4.0]",
    "prepare.workers=1",
    "prepare.anti_aliasing=true",
    "network.patch=[8, 16, 16]",
    "network.features=[4, 4, 8, 8]",
    "network.kernels=[[3, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]",
    "network.strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2], [1, 2, 2]]",
    "network.encoder_convolutions=[1, 1, 1, 1]",
    "network.decoder_convolutions=[1, 1, 1]",
    "training.iterations_per_epoch=2",
    "training.validation_iterations=1",
    "training.deterministic=true",
    "training.device=cpu",
    "export.weights=float16",
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on toy data, stopped after its first epoch and started again for the second."""
    pytest.importorskip("nnunetv2")
    from train import fit

    root = tmp_path_factory.mktemp("fit")
    write_toy_dataset(root / "data", 3)
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    words = ["--data", str(root / "data"), "--out", str(root / "run")]
    for setting in [*SETTINGS, "training.epochs=2"]:
        words += ["--set", setting]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", _interrupt_after_first_epoch())
        with pytest.raises(KeyboardInterrupt):
            fit.run(parser.parse_args(words))
    assert Workspace(root / "run").latest_checkpoint(LABELLED_DATASET, "all").exists()
    assert fit.run(parser.parse_args(words)) == 0
    return root / "run"


def _interrupt_after_first_epoch():  # type: ignore[no-untyped-def]
    """os.replace that is interrupted by Ctrl-C where the progress of the first epoch is written."""
    import os

    real = os.replace

    def replace(source: object, target: object) -> None:
        real(source, target)  # type: ignore[arg-type]
        if str(target).endswith("progress.json"):
            raise KeyboardInterrupt

    return replace


def test_a_training_that_was_stopped_goes_on_from_its_checkpoint(run_folder: Path) -> None:
    workspace = Workspace(run_folder)
    progress = json.loads(workspace.progress(LABELLED_DATASET, "all").read_text(encoding="utf-8"))
    assert (progress["epoch"], progress["fraction"]) == (2, 1.0)
    log = workspace.nnunet_log(LABELLED_DATASET, "all").read_text(encoding="utf-8")
    assert log.count("Epoch 0") == 1
    assert log.count("Epoch 1") == 1


def test_nnunets_plan_has_the_settings_and_no_separate_z(run_folder: Path) -> None:
    plans = json.loads(Workspace(run_folder).plans(LABELLED_DATASET).read_text(encoding="utf-8"))
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == [8, 16, 16]
    assert configuration["resampling_fn_probabilities_kwargs"]["force_separate_z"] is False
    found = plans["foreground_intensity_properties_per_channel"]["0"]
    assert found["max"] == pytest.approx(390)
    assert found == read_intensities(Workspace(run_folder).intensities)


def test_the_bundle_has_the_organs_and_says_where_it_came_from(run_folder: Path) -> None:
    bundle = read_bundle(Workspace(run_folder).bundle)
    assert bundle.plan.classes == CLASSES
    assert bundle.plan.patch == (8, 16, 16)
    assert bundle.plan.anti_aliasing
    assert set(bundle.plan.organ_minima_mm3) == set(CLASSES[1:])
    assert (bundle.plan.provenance["cases"], bundle.plan.provenance["epochs"]) == (3, 2)
    assert bundle.plan.provenance["command"].startswith("python -m train fit --data data --out run --set")


def test_a_run_refuses_settings_that_do_not_fit_what_it_has(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from train import fit

    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    words = [
        "--data",
        str(run_folder.parent / "data"),
        "--out",
        str(run_folder),
        "--set",
        "prepare.spacing=[3.0, 3.0, 3.0]",
    ]
    assert fit.run(parser.parse_args(words)) == 1
    assert "use a new folder" in caplog.text


def test_a_finished_run_is_left_alone(run_folder: Path) -> None:
    from train import nnunet
    from train.config import read_settings

    workspace = Workspace(run_folder)
    before = workspace.final_checkpoint(LABELLED_DATASET, "all").stat().st_mtime_ns
    nnunet.train(LABELLED_DATASET, "all", read_settings(workspace.settings), workspace)
    assert workspace.final_checkpoint(LABELLED_DATASET, "all").stat().st_mtime_ns == before


def test_random_outputs_learn_alone_before_the_rest_of_a_bundles_weights(run_folder: Path) -> None:
    import torch

    from train import fit

    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    root = run_folder.parent / "from-bundle"
    words = ["--data", str(run_folder.parent / "data"), "--out", str(root)]
    start = [f"training.start_from={run_folder / 'bundle'}", "training.learning_rate=0.002"]
    for setting in [*SETTINGS, *start, "training.warmup_iterations=4", "training.epochs=3"]:
        words += ["--set", setting]
    workspace = Workspace(root)

    def rate() -> float:
        return float(json.loads(workspace.progress(LABELLED_DATASET, "all").read_text())["learning_rate"])

    def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
        found = torch.load(checkpoint, map_location="cpu", weights_only=False)["network_weights"]
        return {
            name: values
            for name, values in found.items()
            if "all_modules" not in name and ".decoder.encoder." not in name
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", _interrupt_after_first_epoch())
        with pytest.raises(KeyboardInterrupt):
            fit.run(parser.parse_args(words))
    assert rate() == 0.01
    started = weights(Workspace(run_folder).final_checkpoint(LABELLED_DATASET, "all"))
    alone = weights(workspace.latest_checkpoint(LABELLED_DATASET, "all"))
    coarser = ("decoder.seg_layers.0.", "decoder.seg_layers.1.")  # of three outputs, those that a bundle lacks
    kept = {name for name in alone if not name.startswith(coarser)}
    assert len(alone) == len(kept) + 4
    for name in kept:
        assert torch.allclose(alone[name], started[name], 1e-3, 1e-6), name  # the bundle's are in float16
    assert fit.run(parser.parse_args(words)) == 0
    # As the third epoch begins, with one of the rise's four iterations left.
    assert rate() == pytest.approx(0.002 * (1 / 3) ** 0.9 * 3 / 4)
    done = weights(workspace.final_checkpoint(LABELLED_DATASET, "all"))
    assert not [name for name in kept if torch.equal(done[name], alone[name]) and done[name].ndim > 1]


def test_a_training_ends_with_the_mean_of_its_weights_even_if_it_was_stopped(run_folder: Path) -> None:
    import torch

    from train import fit

    def final(name: str, interrupted: bool) -> dict[str, torch.Tensor]:
        root = run_folder.parent / name
        words = ["--data", str(run_folder.parent / "data"), "--out", str(root)]
        for setting in [*SETTINGS, "training.epochs=2", "training.average_from=0"]:
            words += ["--set", setting]
        parser = argparse.ArgumentParser()
        fit.add_arguments(parser)
        if interrupted:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("os.replace", _interrupt_after_first_epoch())
                with pytest.raises(KeyboardInterrupt):
                    fit.run(parser.parse_args(words))
        assert fit.run(parser.parse_args(words)) == 0
        return weights(root)

    def weights(root: Path) -> dict[str, torch.Tensor]:
        checkpoint = Workspace(root).final_checkpoint(LABELLED_DATASET, "all")
        found: dict[str, torch.Tensor] = torch.load(checkpoint, map_location="cpu", weights_only=False)[
            "network_weights"
        ]
        return found

    stopped, undisturbed, last = final("mean-stopped", True), final("mean", False), weights(run_folder)
    assert all(torch.allclose(stopped[name], undisturbed[name], 1e-5, 1e-7) for name in stopped)
    learnt = [name for name in stopped if "encoder.stages" in name and name.endswith("conv.weight")]
    assert learnt
    assert not any(torch.allclose(stopped[name], last[name], 1e-5, 1e-7) for name in learnt)


@pytest.mark.long
def test_a_resumed_deterministic_training_equals_an_undisturbed_one(run_folder: Path) -> None:
    from train import fit

    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    undisturbed = run_folder.parent / "undisturbed"
    words = ["--data", str(run_folder.parent / "data"), "--out", str(undisturbed)]
    for setting in [*SETTINGS, "training.epochs=2"]:
        words += ["--set", setting]
    assert fit.run(parser.parse_args(words)) == 0
    assert read_bundle(Workspace(undisturbed).bundle).model == read_bundle(Workspace(run_folder).bundle).model
