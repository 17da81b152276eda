"""Two engines for one bundle: OpenVINO on a CPU, ONNX Runtime's CUDA provider on a GPU. Each is imported when chosen."""

import contextlib
import ctypes
import functools
import io
import logging
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from inference.bundle import Bundle, BundleError, Plan
from inference.mapped import MappedWeights
from inference.onnx_file import FLOAT, FLOAT16, INT64, Node, OnnxFileError, append, open_port, opset, ports, to_half
from inference.precision import in_two_parts, widen_head, widen_input
from inference.resample import Floats
from inference.skips import take_apart
from inference.sliding_window import MOST_GROWTH, Window
from inference.volume import Shape

log = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "f32", "bf16"]

CUDA = "CUDAExecutionProvider"
# Heuristic search: the exhaustive one takes seconds and gigabytes at the first window (the paper's peak of 6 GB).
CUDA_SETTINGS: dict[str, Any] = {"cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
# Of ONNX Runtime's arena. A CUDA context takes some 600 MiB beside it, and the challenge tolerates 2048 MiB in all.
GPU_MEMORY = 1200 << 20
# Bytes of the CPU network's largest layer up to which windows may grow: it holds two and a half of them at a time.
LARGEST_LAYER = 360 << 20
# Devices whose memory a small graph gives back after each run.
SHRINKAGE: str | None = "gpu:0"
# Of the operations that add windows up: since this one, Pad takes its widths as an input and every float type.
ADDING_OPSET = 13
# Names of what is added to a network's inputs.
SHARES, PADS, SUMS = ("window_share_z", "window_share_y", "window_share_x"), "window_pads", "window_sums"

# ONNX Runtime from 1.31 on reports to its maker unless told otherwise before it is imported. A medical container must not.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


class EngineError(RuntimeError):
    """The engine that was asked for cannot be had here. The message says what was looked for."""


class Engine(Protocol):
    """A loaded network: normalised window (z, y, x) to logits (classes, z, y, x), float32.

    The array that a call returns is the caller's. ``unit``: by how many voxels (z, y, x) a window may be larger than the plan's
    patch, or by a multiple; None where windows are the patch. ``growth``: how many times the patch's voxels it may have at most.
    """

    name: str
    unit: Shape | None
    growth: float

    def __call__(self, window: Floats) -> Floats: ...


def import_engine(device: Device) -> None:
    """Import the library that ``load_engine`` takes; where it is missing, that says so."""
    with contextlib.suppress(ImportError):
        if device == "cuda" or (device == "auto" and cuda_available()):
            import onnxruntime  # noqa: F401
        else:
            import openvino  # noqa: F401


def load_engine(bundle: Bundle, device: Device = "auto", threads: int = 0, precision: Precision = "auto") -> Engine:
    """Load a bundle's network.

    ``device``: auto takes a GPU where ONNX Runtime finds one. ``threads``: of the CPU engine; 0 takes the cores this process
    is given. ``precision``: bf16 lets the engine compute in bfloat16 (CPU) or float16 (GPU) where the hardware has it, f32
    does not, auto does what the bundle's plan says.
    Raises EngineError where the device cannot be had, BundleError where the network does not fit its plan.
    """
    if precision == "auto" and bundle.plan.precision == "float32":
        precision = "f32"
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


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's core: one for the whole process, and never given back before its end.

    Each core changes the memory in which this process handles signals (the CPU plugin's alternate stack, made for AMX), and
    puts the one before it back when it goes. Of two cores that go in the order they came, the second puts back memory that
    the first has freed, and the next Ctrl-C is a segmentation fault.
    """
    import openvino

    return openvino.Core()


class OpenVinoEngine:
    """The network on CPU cores, through OpenVINO, which rests between windows: ``threads`` may then be used otherwise.

    It is compiled when the size of the windows is known, and anew where one of another size comes.
    """

    def __init__(self, bundle: Bundle, threads: int, precision: Precision = "auto") -> None:
        try:
            self._core = openvino_core()
        except ImportError as error:
            raise EngineError(f"device cpu: OpenVINO is not installed here ({error})") from error
        self.name = f"OpenVINO, CPU, {threads} thread{'s' * (threads > 1)}"
        self.threads = threads
        self._plan = bundle.plan
        self._window: Shape | None = None
        self._compiled: Any = None
        self._options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if precision == "f32":
            self._options["INFERENCE_PRECISION_HINT"] = "f32"
        try:
            self._model = self._core.read_model(bundle.model)
            _check_ports(bundle.plan, len(self._model.inputs), len(self._model.outputs))
            _check_input(bundle.plan, _dimensions(self._model.input(0).partial_shape))
            self._model.reshape([1, 1, *bundle.plan.patch])
            self._weights = _mapped(bundle, self._model)
            _check_output(bundle.plan, _dimensions(self._model.output(0).partial_shape))
            self.unit = _unit(self._model, bundle.plan.patch)
            take_apart(self._model)
            self.growth = self._growth()
            self._in_two_parts = self._half and widen_input(self._model)
            if self._half:
                widen_head(self._model)
        except RuntimeError as error:
            raise _refused(bundle.plan, error) from error

    def __call__(self, window: Floats) -> Floats:
        """Window (z, y, x) to logits (classes, z, y, x). Raises EngineError for a size that the network cannot take."""
        z, y, x = window.shape
        self.make_ready((z, y, x))
        parts = in_two_parts(window) if self._in_two_parts else window[None]
        feed = np.ascontiguousarray(parts[None], dtype=self._type)
        _trim_heap()
        # A request keeps its output for the next window; one of its own lets the logits go with whoever has them.
        output = self._compiled.create_infer_request().infer([feed], share_inputs=True, share_outputs=True)[0]
        _check_output(self._plan, list(output.shape), self._window)
        return np.asarray(output[0], np.float32)

    def make_ready(self, window: Shape) -> None:
        """Compile the network for windows of this size (z, y, x), in place of the size before, unless it was.

        Raises EngineError for a size that the network cannot take, BundleError where it is the plan's.
        """
        if window == self._window:
            return
        try:
            self._compile(window)
        except RuntimeError as error:
            if window == self._plan.patch:
                raise _refused(self._plan, error) from error
            raise EngineError(f"the network takes no window of {window}: {_first_line(error)}") from error

    def _compile(self, window: Shape) -> None:
        self._window, self._compiled = None, None
        self._model.reshape([1, 2 if self._in_two_parts else 1, *window])
        self._compiled = self._core.compile_model(self._model, "CPU", self._options)
        if self._weights:
            self._weights.give_back()
        _trim_heap()
        self._type = self._compiled.input(0).get_element_type().to_dtype()
        self._window = window

    @property
    def _half(self) -> bool:
        """Whether the engine computes in bfloat16."""
        capabilities = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return "BF16" in capabilities and "INFERENCE_PRECISION_HINT" not in self._options

    def _growth(self) -> float:
        """How many times the patch's voxels a window may have: of those that keep to LARGEST_LAYER, and at least the patch."""
        itemsize = 2 if self._half else 4
        layers = (node.output(0).get_shape() for node in self._model.get_ops() if node.get_type_name() == "Convolution")
        largest = max((math.prod(shape) * itemsize for shape in layers), default=1)
        return min(MOST_GROWTH, max(1.0, LARGEST_LAYER / largest))

    def release(self) -> None:
        """Give back what a window takes beside the weights, hundreds of MiB, until the next call."""
        if self._compiled is not None:
            self._compiled.release_memory()


class OnnxRuntimeEngine:
    """The network through ONNX Runtime: on a GPU, beside one CPU thread, as the paper limits it (section 4.3).

    ``type``: of the network's input and output, float16 on a GPU unless ``precision`` is f32. ``adds_up``: whether
    ``add_window`` works, which needs a network of opset 13 or later.
    """

    def __init__(self, bundle: Bundle, precision: Precision = "auto", provider: str = CUDA) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise EngineError(f"device cuda: ONNX Runtime is not installed here ({error})") from error
        if provider == CUDA:
            # Finds CUDA among pip's packages; it prints what it misses, also what is never needed.
            with contextlib.redirect_stdout(io.StringIO()):
                onnxruntime.preload_dlls()
        self.name = f"ONNX Runtime, {provider.removesuffix('ExecutionProvider')}, 1 CPU thread"
        self.unit: Shape | None = None  # the GPU's memory is planned for the patch
        self.growth = 1.0
        self.runtime, self._provider, self._plan = onnxruntime, provider, bundle.plan
        self._tf32 = precision != "f32"
        self._limited = True
        self._content = _read_network(bundle, half=provider == CUDA and precision != "f32")
        inputs, outputs = ports(self._content)
        self._input, self._output = inputs[0].name, outputs[0].name
        self.type: type[np.float16] | type[np.float32] = np.float16 if inputs[0].type == FLOAT16 else np.float32
        self.adds_up = outputs[0].type == inputs[0].type and opset(self._content) >= ADDING_OPSET
        self._network: Any = None
        self._adding: Any = None
        if self.adds_up:
            self._adding = self._load(self._with_sums())
        else:
            self._network = self._load(self._content)

    def __call__(self, window: Floats) -> Floats:
        """Window (z, y, x) to logits (classes, z, y, x)."""
        if self._network is None:
            self._network = self._load(self._content)
        feed = np.ascontiguousarray(window[None, None], dtype=self.type)
        try:
            output = self._network.run(None, {self._input: feed})[0]
        except Exception as error:  # the library's own kinds have no common base
            raise EngineError(f"the network failed on a window of {window.shape}: {_first_line(error)}") from error
        _check_output(self._plan, list(output.shape))
        return np.asarray(output[0], np.float32)

    def add_window(self, image: npt.NDArray[Any], window: Window, sums: Any) -> Any:
        """Run the network on a window of an ``image`` (z, y, x) and add its weighted logits to the ``sums`` of its row.

        ``sums``: what the call before returned, (1, classes, z, Y, X) on the device; a single 0 to begin with.
        Raises EngineError.
        """
        (top, bottom), (left, right) = window.margins
        feeds = {
            self._input: image[window.place][None, None],
            **dict(zip(SHARES, (share.reshape(-1, 1, 1) for share in window.shares), strict=True)),
            PADS: np.array([0, 0, 0, top, left, 0, 0, 0, bottom, right], np.int64),
            SUMS: sums,
        }
        try:
            return self._bind(self._adding, feeds, self._device)
        except Exception as error:  # the library's own kinds have no common base
            if not (self._limited and "memory" in str(error).lower()):
                raise EngineError(f"the network failed on a window: {_first_line(error)}") from error
        log.warning("the network does not fit in %d MiB of GPU memory; going on without a limit", GPU_MEMORY >> 20)
        self._limited = False
        self._adding = self._load(self._with_sums())
        return self.add_window(image, window, sums)

    def stop_adding(self) -> None:
        """Give up ``add_window`` and the device's memory that it holds."""
        self.adds_up = False
        self._adding = None

    def session(self, content: bytes) -> Any:
        """A session for a small graph on the same device, for ``run``."""
        return self._load(content)

    def run(self, session: Any, feeds: Mapping[str, Any]) -> npt.NDArray[Any]:
        """The one output of a small graph, on the host. Its memory on the device is given back. Raises EngineError."""
        try:
            return self._bind(session, feeds, "cpu", shrink=True).numpy()  # type: ignore[no-any-return]
        except Exception as error:  # the library's own kinds have no common base
            raise EngineError(f"stitching failed: {_first_line(error)}") from error

    def session_options(self) -> Any:
        """ONNX Runtime's options for every session: one CPU thread, errors only."""
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        return options

    @property
    def _device(self) -> str:
        return "cuda" if self._provider == CUDA else "cpu"

    def _bind(self, session: Any, feeds: Mapping[str, Any], device: str, shrink: bool = False) -> Any:
        """Run a session on feeds from the host or the device; its output, an OrtValue on ``device``."""
        binding = session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                whole = np.issubdtype(value.dtype, np.integer)
                binding.bind_cpu_input(name, np.ascontiguousarray(value, None if whole else self.type))
            else:
                binding.bind_ortvalue_input(name, value)
        binding.bind_output(session.get_outputs()[0].name, device)
        binding.synchronize_inputs()
        options = self.runtime.RunOptions()
        if shrink and SHRINKAGE and self._provider == CUDA:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", SHRINKAGE)
        session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
        return binding.get_outputs()[0]

    def _with_sums(self) -> bytes:
        """The network with nodes behind it that weight its logits and add them to a row's sums."""
        kind = FLOAT16 if self.type is np.float16 else FLOAT
        nodes = [
            # The three shares are (n, 1, 1) each: turned along their axes and multiplied, they are the window's weights.
            Node("Transpose", [SHARES[1]], ["window_along_y"], {"perm": [1, 0, 2]}),
            Node("Transpose", [SHARES[2]], ["window_along_x"], {"perm": [1, 2, 0]}),
            Node("Mul", ["window_along_y", "window_along_x"], ["window_in_plane"]),
            Node("Mul", [SHARES[0], "window_in_plane"], ["window_weights"]),
            Node("Mul", [self._output, "window_weights"], ["window_weighted"]),
            Node("Pad", ["window_weighted", PADS], ["window_framed"]),
            Node("Add", ["window_framed", SUMS], ["window_added"]),
        ]
        added = [*(open_port(name, kind, 3) for name in SHARES), open_port(PADS, INT64, 1), open_port(SUMS, kind, 5)]
        return append(self._content, nodes, added, [open_port("window_added", kind, 5)])

    def _load(self, content: bytes) -> Any:
        """A session. Raises BundleError where the network is refused, EngineError where the device is not there."""
        settings: dict[str, Any] = {}
        if self._provider == CUDA:
            settings = {**CUDA_SETTINGS, "use_tf32": int(self._tf32)}
            if self._limited:
                settings["gpu_mem_limit"] = GPU_MEMORY
        try:
            session = self.runtime.InferenceSession(
                content, self.session_options(), providers=[(self._provider, settings)]
            )
        except Exception as error:  # the library's own kinds have no common base
            raise BundleError(
                f"{self._plan.model.file}: ONNX Runtime refuses the network ({_first_line(error)})"
            ) from error
        if self._provider not in session.get_providers():
            raise EngineError(f"device cuda: no GPU that ONNX Runtime can use; it found {session.get_providers()}")
        return session


def _refused(plan: Plan, error: BaseException) -> BundleError:
    return BundleError(f"{plan.model.file}: OpenVINO refuses the network ({_first_line(error)})")


def _mapped(bundle: Bundle, model: Any) -> MappedWeights | None:
    """The weights of an OpenVINO model, laid over the bundle's file where there is one; None where that cannot be done."""
    if bundle.file is None or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    try:
        weights = MappedWeights(bundle.file)
        return weights if weights.lay_under(model) else None
    except (OSError, ValueError) as error:
        log.info("%s: its weights stay in memory twice (%s)", bundle.file, _first_line(error))
        return None


def _unit(model: Any, patch: Shape) -> Shape | None:
    """By how many voxels (z, y, x) windows of an OpenVINO model can grow: what a U-Net's decoder enlarges its coarsest level by.

    None for a network that enlarges by other means than transposed convolutions, or whose output does not grow with its input.
    """
    strides = [
        node.get_attributes()["strides"]
        for node in model.get_ops()
        if node.get_type_name() == "ConvolutionBackpropData"
    ]
    unit = [math.prod(int(stride[axis]) for stride in strides) for axis in range(3)]
    larger = [size + more for size, more in zip(patch, unit, strict=True)]
    try:
        model.reshape([1, 1, *larger])
        grows = _dimensions(model.output(0).partial_shape)[2:] == larger
    except RuntimeError:
        grows = False
    model.reshape([1, 1, *patch])
    return (unit[0], unit[1], unit[2]) if strides and grows else None


def _trim_heap() -> None:
    """Have glibc give freed memory back: reading a network leaves hundreds of MiB of it among the little that is in use, and
    painting labels tens."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _read_network(bundle: Bundle, half: bool) -> bytes:
    """The bundle's network, checked against its plan, in float16 where that is asked for and can be."""
    try:
        inputs, outputs = ports(bundle.model)
        _check_ports(bundle.plan, len(inputs), len(outputs))
        _check_input(bundle.plan, list(inputs[0].shape) or [None] * 5)
        _check_output(bundle.plan, list(outputs[0].shape) or [None] * 5)
    except OnnxFileError as error:
        raise BundleError(
            f"{bundle.plan.model.file}: ONNX Runtime refuses the network ({_first_line(error)})"
        ) from error
    try:
        return to_half(bundle.model) if half else bundle.model
    except OnnxFileError as error:
        log.warning("%s: float32, because it cannot be made float16 (%s)", bundle.plan.model.file, error)
        return bundle.model


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


def _check_output(plan: Plan, shape: list[int | None], window: Shape | None = None) -> None:
    """``window``: its size, where it is not the plan's patch."""
    _check_shape(plan, "output", shape, (1, len(plan.classes), *(window or plan.patch)))


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
