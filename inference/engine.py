"""Two engines for one bundle: OpenVINO on a CPU, ONNX Runtime's CUDA provider on a GPU. Each is imported when chosen."""

import contextlib
import io
import logging
import math
import os
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from inference.bundle import Bundle, BundleError, Plan
from inference.resample import Floats

log = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "f32"]

# ONNX Runtime from 1.31 on reports to its maker unless told otherwise before it is imported. A medical container must not.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


class EngineError(RuntimeError):
    """The engine that was asked for cannot be had here. The message says what was looked for."""


class Engine(Protocol):
    """A loaded network: normalised window (z, y, x) to logits (classes, z, y, x), float32.

    The array that a call returns is valid until the next call.
    """

    name: str

    def __call__(self, window: Floats) -> Floats: ...


def load_engine(bundle: Bundle, device: Device = "auto", threads: int = 0, precision: Precision = "auto") -> Engine:
    """Load a bundle's network.

    ``device``: auto takes a GPU where ONNX Runtime finds one. ``threads``: of the CPU engine; 0 takes the cores this process
    is given. ``precision``: auto lets the engine compute in bf16 (CPU) or TF32 (GPU) where the hardware has it, f32 does not.
    Raises EngineError where the device cannot be had, BundleError where the network does not fit its plan.
    """
    if device == "cuda" or (device == "auto" and cuda_available()):
        return OnnxRuntimeEngine(bundle, precision)
    try:
        return OpenVinoEngine(bundle, threads or available_cores(), precision)
    except EngineError as error:
        if device == "auto":
            raise EngineError(f"no GPU was found (docker run --gpus gives one), and: {error}") from error
        raise


def available_cores() -> int:
    """Cores this process may use: CPU affinity, and the quota of the container's control group, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(cores, math.ceil(quota))) if quota else cores


def _cgroup_quota(root: Path) -> float | None:
    """Cores of CPU time that the control group allows (version 2, then 1), None without a limit."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if limit in ("max", "-1") else int(limit) / int(period)


def cuda_available() -> bool:
    """Whether this image has ONNX Runtime's CUDA provider and this machine an NVIDIA GPU."""
    if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")):
        return False
    try:
        import onnxruntime
    except ImportError:
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


class OpenVinoEngine:
    """The network on CPU cores, through OpenVINO."""

    def __init__(self, bundle: Bundle, threads: int, precision: Precision = "auto") -> None:
        try:
            import openvino
        except ImportError as error:
            raise EngineError(f"device cpu: OpenVINO is not installed here ({error})") from error
        self.name = f"OpenVINO, CPU, {threads} thread{'s' * (threads > 1)}"
        core = openvino.Core()
        try:
            model = core.read_model(bundle.model)
            _check_ports(bundle.plan, len(model.inputs), len(model.outputs))
            _check_input(bundle.plan, _dimensions(model.input(0).partial_shape))
            model.reshape([1, 1, *bundle.plan.patch])
            _check_output(bundle.plan, _dimensions(model.output(0).partial_shape))
            options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
            if precision == "f32":
                options["INFERENCE_PRECISION_HINT"] = "f32"
            compiled = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            raise BundleError(
                f"{bundle.plan.model.file}: OpenVINO refuses the network ({_first_line(error)})"
            ) from error
        self._type = compiled.input(0).get_element_type().to_dtype()
        self._request = compiled.create_infer_request()
        self._plan = bundle.plan

    def __call__(self, window: Floats) -> Floats:
        """Window (z, y, x) to logits (classes, z, y, x)."""
        feed = np.ascontiguousarray(window[None, None], dtype=self._type)
        output = self._request.infer([feed], share_inputs=True, share_outputs=True)[0]
        _check_output(self._plan, list(output.shape))
        return np.asarray(output[0], np.float32)


class OnnxRuntimeEngine:
    """The network through ONNX Runtime: on a GPU, beside one CPU thread, as the paper limits it (section 4.3)."""

    def __init__(self, bundle: Bundle, precision: Precision = "auto", provider: str = "CUDAExecutionProvider") -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise EngineError(f"device cuda: ONNX Runtime is not installed here ({error})") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        settings: dict[str, Any] = {}
        if provider == "CUDAExecutionProvider":
            # Finds CUDA among pip's packages; it prints what it misses, also what is never needed.
            with contextlib.redirect_stdout(io.StringIO()):
                onnxruntime.preload_dlls()
            # Heuristic search: the exhaustive one takes seconds and gigabytes at the first window (the paper's peak of 6 GB).
            settings = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
            settings["use_tf32"] = "0" if precision == "f32" else "1"
        try:
            session = onnxruntime.InferenceSession(bundle.model, options, providers=[(provider, settings)])
        except Exception as error:  # the library's own kinds have no common base
            raise BundleError(
                f"{bundle.plan.model.file}: ONNX Runtime refuses the network ({_first_line(error)})"
            ) from error
        if provider not in session.get_providers():
            raise EngineError(f"device cuda: no GPU that ONNX Runtime can use; it found {session.get_providers()}")
        self.name = f"ONNX Runtime, {provider.removesuffix('ExecutionProvider')}, 1 CPU thread"
        _check_ports(bundle.plan, len(session.get_inputs()), len(session.get_outputs()))
        port = session.get_inputs()[0]
        _check_input(bundle.plan, [n if isinstance(n, int) else None for n in port.shape])
        _check_output(bundle.plan, [n if isinstance(n, int) else None for n in session.get_outputs()[0].shape])
        self._input, self._type = port.name, np.float16 if port.type == "tensor(float16)" else np.float32
        self._session, self._plan = session, bundle.plan

    def __call__(self, window: Floats) -> Floats:
        """Window (z, y, x) to logits (classes, z, y, x)."""
        feed = np.ascontiguousarray(window[None, None], dtype=self._type)
        try:
            output = self._session.run(None, {self._input: feed})[0]
        except Exception as error:  # as above
            raise EngineError(f"the network failed on a window of {window.shape}: {_first_line(error)}") from error
        _check_output(self._plan, list(output.shape))
        return np.asarray(output[0], np.float32)


def _dimensions(shape: Any) -> list[int | None]:
    """OpenVINO's partial shape as a list; an open dimension, or one of five where even their number is open, is None."""
    if shape.rank.is_dynamic:
        return [None] * 5
    return [n.get_length() if n.is_static else None for n in shape]


def _check_ports(plan: Plan, inputs: int, outputs: int) -> None:
    if (inputs, outputs) != (1, 1):
        raise BundleError(f"{plan.model.file}: {inputs} inputs and {outputs} outputs; expected one of each")


def _check_input(plan: Plan, shape: list[int | None]) -> None:
    _check_shape(plan, "input", shape, (1, 1, *plan.patch))


def _check_output(plan: Plan, shape: list[int | None]) -> None:
    _check_shape(plan, "output", shape, (1, len(plan.classes), *plan.patch))


def _check_shape(plan: Plan, port: str, found: list[int | None], expected: tuple[int, ...]) -> None:
    """``None`` in ``found`` is a dimension that the network leaves open."""
    fits = len(found) == len(expected) and all(n in (None, m) for n, m in zip(found, expected, strict=True))
    if not fits:
        shape = " x ".join("any" if n is None else str(n) for n in found)
        wanted = " x ".join(str(n) for n in expected)
        raise BundleError(f"{plan.model.file}: {port} of {shape}; the plan expects {wanted} (N, channels, z, y, x)")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
