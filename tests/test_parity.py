"""Same weights, same scan: this core against nnU-Net's own predictor."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inference.bundle import read_bundle
from inference.engine import load_engine
from inference.volume import read_volume, write_volume
from train.phantom import generate
from train.phantom.canvas import Grid

pytest.importorskip("nnunetv2")

from tests.conftest import block_levels, block_scan, make_bundle, save_nifti
from train import nnunet
from train.parity import ParityError, check_parity, compare

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


def test_the_shipped_weights_give_nnunets_masks(tmp_path: Path) -> None:
    """Over three bodies: how near the two come depends on the body (docs/log.md)."""
    spacing = (5.0, 1.2, 1.2)
    bundle = read_bundle(WEIGHTS)
    bundle = replace(bundle, plan=replace(bundle.plan, step=0.9))
    engine = load_engine(bundle, "cpu", precision="f32")
    found = {}
    for seed in (53, 54, 55):
        body = generate(seed, Grid((54, 250, 320), spacing, (-130.0, -150.0, -192.0)))
        path = tmp_path / f"{seed}.nii.gz"
        write_volume(path, body.hu, np.diag([-spacing[2], -spacing[1], spacing[0], 1.0]))
        of_body = compare(bundle, read_volume(path), engine, False)
        assert len(of_body) >= 11
        found |= {(seed, organ): value for organ, value in of_body.items()}
    assert np.mean(list(found.values())) >= 0.998, found
    assert min(found.values()) >= 0.99, found


def test_a_network_on_which_the_predictors_differ_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = block_levels()
    scan = save_nifti(tmp_path / "scan.nii.gz", block_scan(levels))
    monkeypatch.setattr(nnunet, "predict", lambda *_: levels)
    check_parity(make_bundle(), scan)
    monkeypatch.setattr(nnunet, "predict", lambda *_: np.where(levels == 4, 0, levels))
    with pytest.raises(ParityError, match=r"0\.0000 for pancreas; expected at least 0\.99 and 0\.97"):
        check_parity(make_bundle(), scan)
