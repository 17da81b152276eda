"""Same weights, same scan: this core against nnU-Net's own predictor."""

from pathlib import Path

import numpy as np
import pytest

from inference.bundle import read_bundle
from inference.engine import load_engine
from inference.volume import read_volume, write_volume
from train.phantom import generate
from train.phantom.canvas import Grid

pytest.importorskip("nnunetv2")

from train.parity import compare

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


def test_the_shipped_weights_give_nnunets_masks(tmp_path: Path) -> None:
    spacing = (5.0, 1.2, 1.2)
    body = generate(53, Grid((54, 250, 320), spacing, (-130.0, -150.0, -192.0)))
    write_volume(tmp_path / "scan.nii.gz", body.hu, np.diag([-spacing[2], -spacing[1], spacing[0], 1.0]))
    bundle = read_bundle(WEIGHTS)
    found = compare(bundle, read_volume(tmp_path / "scan.nii.gz"), load_engine(bundle, "cpu", precision="f32"), False)
    assert len(found) >= 11
    assert np.mean(list(found.values())) >= 0.99, found
    assert min(found.values()) >= 0.97, found
