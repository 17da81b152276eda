"""A network from elsewhere: another architecture, another exporter, another grid, run with a plan written by hand."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from inference.__main__ import main
from inference.organs import CLASSES
from inference.volume import read_labels, read_volume
from tests.conftest import save_nifti

torch = pytest.importorskip("torch")

PATCH = (96, 160, 160)
SPACING = (2.0, 1.5, 1.5)


class Residual(torch.nn.Module):
    """No U-Net: strided, residual, batch norm, a transposed convolution. Its last layer separates three ranges of HU."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Conv3d(1, 4, 2, 2)
        self.norm = torch.nn.BatchNorm3d(4)
        self.body = torch.nn.Conv3d(4, 4, 3, padding=1)
        self.up = torch.nn.ConvTranspose3d(4, 4, 2, 2)
        self.head = torch.nn.Conv3d(5, len(CLASSES), 1)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=1e-3)
        with torch.no_grad():  # the skipped input decides: classes 0, 1 and 5 around -1, 0.5 and 2
            self.head.weight[:, 4, 0, 0, 0] = 0
            self.head.bias[:] = -100
            for index, level in ((0, -1.0), (1, 0.5), (5, 2.0)):
                self.head.weight[index, 4, 0, 0, 0] = 40 * level
                self.head.bias[index] = -20 * level**2

    def forward(self, image):
        low = torch.relu(self.norm(self.down(image)))
        return self.head(torch.cat((self.up(low + self.body(low)), image), 1))


def export() -> bytes:
    """By torch's dynamo exporter, opset 20; the project's own bundles come from the TorchScript one, opset 18."""
    batch = torch.export.Dim("batch", min=1, max=4)
    program = torch.onnx.export(
        Residual().eval(),
        (torch.zeros(2, 1, *PATCH),),
        input_names=["input"],
        output_names=["output"],
        opset_version=20,
        dynamic_shapes=({0: batch},),
        dynamo=True,
        verbose=False,
    )
    buffer = io.BytesIO()
    program.save(buffer)
    return buffer.getvalue()


def test_it_runs_with_a_plan_written_by_hand(tmp_path: Path) -> None:
    weights = tmp_path / "theirs"
    weights.mkdir()
    model = export()
    (weights / "network.onnx").write_bytes(model)
    plan = {
        "format_version": 1,
        "model": {"file": "network.onnx", "sha256": hashlib.sha256(model).hexdigest()},
        "orientation": "LPS",
        "spacing": SPACING,
        "patch": PATCH,
        "step": 0.9,
        "classes": CLASSES,
        "intensity": {"clip_low": -160, "clip_high": 240, "mean": 40, "std": 80},
        "organ_minima_mm3": {},
        "provenance": {"exported by": "somebody"},
    }
    (weights / "plan.json").write_text(json.dumps(plan))
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    hu = np.full((60, 130, 170), -1000, np.int16)
    hu[5:55, 20:110, 30:140] = 80  # level 0.5: liver
    hu[2:58, 60:72, 80:92] = 200  # level 2: aorta
    save_nifti(inputs / "CASE_0000.nii.gz", hu, (4.0, 2.0, 2.0))
    assert main([str(inputs), str(tmp_path / "outputs"), "--weights", str(weights), "--threads", "2"]) == 0
    found = read_labels(tmp_path / "outputs" / "CASE.nii.gz")
    assert found.shape == read_volume(inputs / "CASE_0000.nii.gz").shape
    for organ, level in ((1, 80), (5, 200)):
        truth = hu == level
        overlap = 2 * np.count_nonzero(truth & (found.voxels == organ))
        assert overlap / (np.count_nonzero(truth) + np.count_nonzero(found.voxels == organ)) > 0.9
