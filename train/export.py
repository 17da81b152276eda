"""A trained checkpoint as a bundle: model.onnx and plan.json, checked against torch before it is written."""

import argparse
import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inference.bundle import AXES, FORMAT_VERSION, Bundle, Intensity, Model, Plan, write_bundle
from inference.organs import CLASSES
from inference.volume import ORIENTATION, Shape
from train import nnunet
from train.config import Config, read_settings
from train.intensities import INTENSITIES
from train.parity import check_parity
from train.workspace import CONFIGURATION, Workspace, iteration_dataset

log = logging.getLogger(__name__)

MODEL_NAME = "model.onnx"
INPUT, OUTPUT = "image", "logits"
OPSET = 18
# Largest error of the exported network against torch, both in float32, relative to the largest logit.
TOLERANCE = 1e-3
# Tensors below this stay float32: biases and norms are small, and rounding them buys nothing.
SMALL_TENSOR = 4096


class ExportError(RuntimeError):
    """A network that cannot be exported. The message says what was found and what was expected."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m train export``."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for plan.json and model.onnx")
    parser.add_argument("--fold", default="all", help="which training: all or a fold's number (default: all)")
    parser.add_argument(
        "--iteration", type=int, metavar="K", help="of a run of `loop`: which iteration (default: the final model's)"
    )
    parser.add_argument(
        "--latest", action="store_true", help="take the latest checkpoint of a training that still runs"
    )


def run(arguments: argparse.Namespace) -> int:
    """Export a run's network; returns the exit code."""
    workspace = Workspace(arguments.run)
    try:
        config = read_settings(workspace.settings)
        fold = parse_fold(arguments.fold)
        path = workspace.latest_checkpoint if arguments.latest else workspace.final_checkpoint
        dataset = _dataset(arguments.iteration, config, workspace)
        case = nnunet.read_cases(dataset, workspace)[0]
        export(path(dataset, fold), dataset, config, workspace, arguments.out, case)
    except (ValueError, RuntimeError, OSError) as error:
        log.error("%s", error)
        return 1
    return 0


def parse_fold(text: str) -> int | str:
    """``all`` or a fold's number. Raises ExportError."""
    if text == "all":
        return text
    if not text.isdigit():
        raise ExportError(f"--fold {text!r}; expected all or a number")
    return int(text)


def _dataset(iteration: int | None, config: Config, workspace: Workspace) -> str:
    """The data set whose training is meant: of a loop the final model's, unless an iteration is named."""
    if iteration is None:
        iteration = config.loop.iterations if workspace.cases.exists() else 0
    return iteration_dataset(iteration)


def export(
    checkpoint: Path,
    dataset: str,
    config: Config,
    workspace: Workspace,
    out: Path,
    parity_case: str | None = None,
    auxiliary: bool = False,
) -> Plan:
    """Write the bundle of a checkpoint to ``out``.

    ``parity_case``: a prepared case on which this core must agree with nnU-Net's predictor. ``auxiliary``: the bundle keeps
    the auxiliary classes, as the models that make pseudo-labels do; otherwise they are folded into the background. Raises
    ExportError when the file differs from torch or is too big, ParityError when the predictors differ; then nothing is
    written.
    """
    network = nnunet.load_network(dataset, checkpoint, config, workspace)
    plans = nnunet.read_plans(dataset, workspace)
    patch = plans["configurations"][CONFIGURATION]["patch_size"]
    patch = (int(patch[0]), int(patch[1]), int(patch[2]))
    kind = config.export.weights
    half = kind != "float32"
    rounding = _round_weights(network, patch, kind) if half else 0.0
    if len(config.classes) > len(CLASSES) and not auxiliary:
        network = fold_auxiliary(network)
    model = to_onnx(network, patch, half)
    error = _compare(model, network, patch)
    megabytes = len(model) / 1e6
    log.info("export: %.1f MB, largest error against torch %.2g of the largest logit", megabytes, error)
    if error > TOLERANCE:
        raise ExportError(
            f"{MODEL_NAME} differs from torch by {error:.2g} of the largest logit; expected at most {TOLERANCE:g}"
        )
    if megabytes > config.export.max_megabytes:
        raise ExportError(
            f"{MODEL_NAME} has {megabytes:.1f} MB; expected at most {config.export.max_megabytes:g} (export.max_megabytes)"
        )
    provenance = _provenance(checkpoint, workspace) | {
        "error_against_torch": error,
        "error_of_rounded_weights": rounding,
    }
    plan = Plan(
        format_version=FORMAT_VERSION,
        model=Model(MODEL_NAME, hashlib.sha256(model).hexdigest()),
        orientation=ORIENTATION,
        spacing=config.prepare.spacing,
        patch=patch,
        step=config.inference.step,
        classes=config.classes if auxiliary else CLASSES,
        intensity=_intensity(plans),
        organ_minima_mm3=json.loads(workspace.organ_minima.read_text(encoding="utf-8")),
        mirrored_axes=AXES if config.training.mirroring else (),
        precision=config.export.precision,
        anti_aliasing=config.prepare.anti_aliasing,
        provenance=provenance,
    )
    bundle = Bundle(plan, model)
    if parity_case is not None:
        check_parity(bundle, workspace.image(parity_case))
    write_bundle(out, bundle)
    log.info("export: wrote %s", out)
    return plan


def to_onnx(network: Any, patch: Shape, half: bool) -> bytes:
    """The ONNX file of a torch network, input (N, 1, z, y, x), output (N, classes, z, y, x), both float32.

    ``half``: weights are stored in float16, and widened when the file is loaded.
    """
    import io

    import onnx
    import torch

    buffer = io.BytesIO()
    batch = {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}}
    with torch.no_grad():
        torch.onnx.export(
            network,
            (torch.zeros(1, 1, *patch),),
            buffer,  # type: ignore[arg-type]  # the TorchScript exporter writes to files too
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamic_axes=batch,
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    if half:
        _store_half(model)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def fold_auxiliary(network: Any) -> Any:
    """``network`` with 14 channels: the background's logit becomes the largest of background and auxiliary classes.

    So an organ wins a voxel exactly where it wins among all classes.
    """
    import torch

    class Folded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: Any) -> Any:
            logits = self.network(image)
            organs = logits[:, 1 : len(CLASSES)]
            rest = torch.cat((logits[:, :1], logits[:, len(CLASSES) :]), 1)
            return torch.cat((rest.amax(1, keepdim=True), organs), 1)

    return Folded().eval()


def _store_half(model: Any) -> None:
    """Replace large float32 weights by float16 ones, each followed by a cast; engines fold it when they load the file."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < SMALL_TENSOR:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_float16"))
        casts.append(helper.make_node("Cast", [f"{name}_float16"], [name], f"{name}_cast", to=TensorProto.FLOAT))
    for node in reversed(casts):
        model.graph.node.insert(0, node)


def _round_weights(network: Any, patch: Shape, kind: str) -> float:
    """Round large weights in place, to float16 or first to bfloat16. Returns by how much the logits change, relative to the largest."""
    import torch

    before = _run_torch(network, patch)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() >= SMALL_TENSOR:
                rounded = parameter.bfloat16() if kind == "bfloat16" else parameter
                parameter.copy_(rounded.half().float())
    return _relative(_run_torch(network, patch), before)


def _compare(model: bytes, network: Any, patch: Shape) -> float:
    """Largest difference between the file, run in float32, and torch, relative to the largest logit."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found = session.run([OUTPUT], {INPUT: _test_patch(patch)})[0]
    return _relative(found, _run_torch(network, patch))


def _run_torch(network: Any, patch: Shape) -> npt.NDArray[np.float32]:
    import torch

    with torch.no_grad():
        logits: npt.NDArray[np.float32] = network(torch.from_numpy(_test_patch(patch))).numpy()
    return logits


def _test_patch(patch: Shape) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((1, 1, *patch)).astype(np.float32)


def _relative(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _intensity(plans: Mapping[str, Any]) -> Intensity:
    """nnU-Net's foreground statistics as the plan of a bundle names them."""
    found = plans[INTENSITIES]["0"]
    return Intensity(found["percentile_00_5"], found["percentile_99_5"], found["mean"], max(found["std"], 1e-8))


def _provenance(checkpoint: Path, workspace: Workspace) -> dict[str, Any]:
    """Where the network came from: the run's own record, how long it trained, versions, commit."""
    recorded: dict[str, Any] = {}
    if workspace.provenance.exists():
        recorded = json.loads(workspace.provenance.read_text(encoding="utf-8"))
    progress = checkpoint.parent / "progress.json"
    if progress.exists():
        last = json.loads(progress.read_text(encoding="utf-8"))
        recorded |= {
            "epochs": last["epoch"],
            "minutes": round(last["seconds"] / 60, 1),
            "checkpoint": checkpoint.name,
        }
    # Those of the training, where it recorded them.
    return {"versions": package_versions(), "commit": git_commit()} | recorded


def package_versions() -> dict[str, str]:
    """Versions of what made the network."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "nnunetv2", "numpy", "onnx", "ray"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_commit() -> str:
    """The commit of this checkout; outside one what the image says it was made from, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("IMAGE_VERSION", "unknown")
