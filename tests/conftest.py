"""What several tests need: scans of blocks, networks with a known answer, bundles made of them."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from inference.bundle import FORMAT_VERSION, Bundle, Intensity, Model, Plan, write_bundle
from inference.organs import CLASSES

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def real_scans() -> Path:
    """Folder of real CT scans beside the repository; not everybody has it."""
    folder = SHARED / "ct"
    if not folder.is_dir():
        pytest.skip("no real scans beside the repository")
    return folder


def level_weights(classes: int, shift: tuple[int, int, int] = (0, 0, 0)) -> tuple[np.ndarray, np.ndarray]:
    """Kernel (classes, 1, 3, 3, 3) and bias of a convolution whose arg-max is the whole number nearest to its input.

    Class k has the line k * x - k^2 / 2, and the highest line at x belongs to the nearest k. ``shift`` (z, y, x) looks at
    a neighbour instead, so that the answer depends on the direction of the axes.
    """
    levels = np.arange(classes, dtype=np.float32)
    kernel = np.zeros((classes, 1, 3, 3, 3), np.float32)
    kernel[:, 0, 1 + shift[0], 1 + shift[1], 1 + shift[2]] = levels
    return kernel, -(levels**2) / 2


def level_model(
    classes: int = 14,
    shift: tuple[int, int, int] = (0, 0, 0),
    *,
    shape: tuple[int | str, ...] = ("N", 1, "z", "y", "x"),
    names: tuple[str, str] = ("input", "output"),
    half: bool = False,
    opset: int = 17,
) -> bytes:
    """An ONNX network (N, 1, z, y, x) -> (N, classes, z, y, x): see ``level_weights``."""
    number, kind = (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
    kernel, bias = level_weights(classes, shift)
    weights = [numpy_helper.from_array(kernel.astype(number), "k"), numpy_helper.from_array(bias.astype(number), "b")]
    node = helper.make_node("Conv", [names[0], "k", "b"], [names[1]], pads=[1] * 6)
    ports = [
        helper.make_tensor_value_info(name, kind, [shape[0], channels, *shape[2:]])
        for name, channels in zip(names, (shape[1], classes), strict=True)
    ]
    graph = helper.make_graph([node], "levels", ports[:1], ports[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def u_net(classes: int = 14) -> bytes:
    """An ONNX network of two levels, (2, 4, 4) voxels of the fine one to one of the coarse, with a skip of two arrays."""
    r = np.random.default_rng(0)
    shapes = {"fine": (4, 1, 3, 3, 3), "half": (6, 4, 2, 4, 4), "up": (6, 3, 2, 4, 4), "last": (classes, 11, 1, 3, 3)}
    shapes |= {"lift": (3,)}
    weights = [numpy_helper.from_array(r.normal(size=shape).astype(np.float32), name) for name, shape in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["input", "fine"], ["skip"], pads=[1] * 6),
        helper.make_node("Relu", ["skip"], ["positive"]),
        helper.make_node("Conv", ["skip", "half"], ["coarse"], strides=[2, 4, 4]),
        helper.make_node("ConvTranspose", ["coarse", "up", "lift"], ["enlarged"], strides=[2, 4, 4]),
        helper.make_node("Concat", ["enlarged", "skip", "positive"], ["joined"], axis=1),
        helper.make_node("Conv", ["joined", "last"], ["output"], pads=[0, 1, 1, 0, 1, 1]),
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", channels, "z", "y", "x"])
        for name, channels in (("input", 1), ("output", classes))
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "u_net", ports[:1], ports[1:], weights), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def make_plan(model: bytes, **changes: Any) -> Plan:
    """A plan on a 4 x 2 x 2 mm grid where 10 HU are one level of ``level_model``."""
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model": Model("model.onnx", hashlib.sha256(model).hexdigest()),
        "orientation": "LPS",
        "spacing": (4.0, 2.0, 2.0),
        "patch": (8, 16, 16),
        "step": 0.9,
        "classes": CLASSES,
        "intensity": Intensity(-1000.0, 1000.0, 0.0, 10.0),
        "organ_minima_mm3": {},
        "provenance": {},
    }
    return Plan(**{**values, **changes})


def make_bundle(model: bytes | None = None, **changes: Any) -> Bundle:
    content = level_model() if model is None else model
    return Bundle(make_plan(content, **changes), content)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a bundle whose network answers HU / 10."""
    folder = tmp_path_factory.mktemp("weights")
    write_bundle(folder, make_bundle())
    return folder


def block_levels(shape: tuple[int, int, int] = (20, 48, 56)) -> np.ndarray:
    """Label map (z, y, x) of thirteen blocks, no two alike and none symmetric."""
    labels = np.zeros(shape, np.uint8)
    for organ in range(1, 14):
        row, column = divmod(organ - 1, 4)
        labels[2 + organ // 3 : 14 + organ // 4, 3 + 11 * row : 11 + 11 * row, 3 + 13 * column : 12 + 13 * column] = (
            organ
        )
    return labels


def block_scan(labels: np.ndarray) -> np.ndarray:
    """The CT (z, y, x), int16 HU, whose levels are ``labels``; one corner is air, as around every patient."""
    scan = labels.astype(np.int16) * 10
    scan[0, 0, 0] = -1000
    return scan


SaveScan = Callable[..., Path]


def save_nifti(path: Path, voxels: np.ndarray, spacing: tuple[float, float, float] = (4.0, 2.0, 2.0)) -> Path:
    """Store an inside array (z, y, x) as NIfTI in LPS order, with a plain affine."""
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    affine[:3, 3] = 100.0, 90.0, -200.0
    image = nib.Nifti1Image(voxels.T, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    nib.save(image, path)
    return path


@pytest.fixture(scope="module")
def trainer() -> Iterator[ModuleType]:
    """The trainer's file, imported as nnU-Net imports it: on its own, its folder on the path."""
    pytest.importorskip("nnunetv2")
    path = Path(__file__).parents[1] / "train" / "trainer" / "settings_trainer.py"
    spec = importlib.util.spec_from_file_location("settings_trainer_under_test", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        spec.loader.exec_module(module)
        yield module
