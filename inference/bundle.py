"""A bundle: ``plan.json`` beside ``model.onnx``, everything the container knows. The contract is docs/formats.md."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from inference.organs import BACKGROUND
from inference.volume import Shape, Spacing, atomic_write

FORMAT_VERSION = 2
PLAN_NAME = "plan.json"
AXES = (0, 1, 2)
# Arithmetic that a network bears; the first where its plan does not say.
PRECISIONS = ("bfloat16", "float32")


class BundleError(ValueError):
    """A bundle that cannot be used. The message names the file, the field, what was found and what was expected."""


@dataclass(frozen=True)
class Intensity:
    """CT normalisation, nnU-Net's scheme: clip to [clip_low, clip_high] HU, then (HU - mean) / std."""

    clip_low: float
    clip_high: float
    mean: float
    std: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _expect(_is_number(value), f"intensity.{name}", value, "a finite number")
        _expect(
            self.clip_low < self.clip_high, "intensity.clip_low", self.clip_low, f"less than clip_high {self.clip_high}"
        )
        _expect(self.std > 0, "intensity.std", self.std, "more than 0")


@dataclass(frozen=True)
class Model:
    """The network's file, beside plan.json, and the SHA-256 of its bytes in hexadecimal."""

    file: str
    sha256: str

    def __post_init__(self) -> None:
        plain = isinstance(self.file, str) and self.file not in ("", ".", "..") and "/" not in self.file
        _expect(plain, "model.file", self.file, "the name of a file beside plan.json")
        hexadecimal = (
            isinstance(self.sha256, str) and len(self.sha256) == 64 and not set(self.sha256) - set("0123456789abcdef")
        )
        _expect(hexadecimal, "model.sha256", self.sha256, "64 hexadecimal digits in lower case")


@dataclass(frozen=True)
class Plan:
    """What a network was trained on and how it is run. Every list is in (z, y, x) order.

    ``spacing``: working grid, mm. ``patch``: window, voxels. ``step``: window step as a fraction of the patch, (0, 1].
    ``classes``: names of the output channels; a voxel's label is its channel's index, so 0 is background.
    ``orientation``: the directions in which x, y, z grow: L or R, P or A, S or I.
    ``organ_minima_mm3``: smallest volume of an organ in the labelled training set, for the first post-processing rule
    (paper section 2.3); organs without one skip that rule. ``mirrored_axes``: axes along which training flipped its
    patches (0 z, 1 y, 2 x); test-time mirroring along another gives nonsense. ``precision``: bfloat16 lets an engine
    compute in 16 bits where that is faster; float32 is for networks whose labels that would change. ``anti_aliasing``:
    scans are averaged, not sampled, where the working grid is coarser than theirs, as they were for training.
    ``provenance``: free, where the network came from.
    """

    format_version: int
    model: Model
    orientation: str
    spacing: Spacing
    patch: Shape
    step: float
    classes: tuple[str, ...]
    intensity: Intensity
    organ_minima_mm3: Mapping[str, float]
    mirrored_axes: tuple[int, ...] = AXES
    precision: str = PRECISIONS[0]
    anti_aliasing: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _expect(self.format_version == FORMAT_VERSION, "format_version", self.format_version, str(FORMAT_VERSION))
        letters = isinstance(self.orientation, str) and len(self.orientation) == 3
        known = letters and all(
            letter in pair for letter, pair in zip(self.orientation, ("LR", "PA", "SI"), strict=True)
        )
        _expect(known, "orientation", self.orientation, "one of L or R, one of P or A, one of S or I, such as LPS")
        _expect(
            _is_triple(self.spacing, _is_positive), "spacing", self.spacing, "three lengths in mm (z, y, x) above 0"
        )
        _expect(_is_triple(self.patch, _is_count), "patch", self.patch, "three whole numbers (z, y, x) above 0")
        _expect(_is_number(self.step) and 0 < self.step <= 1, "step", self.step, "a number above 0 and at most 1")
        names = isinstance(self.classes, tuple) and all(isinstance(name, str) and name for name in self.classes)
        _expect(names and len(self.classes) <= 256, "classes", self.classes, "a list of at most 256 names")
        _expect(
            len(self.classes) >= 2 and self.classes[0] == BACKGROUND,
            "classes",
            self.classes,
            f"{BACKGROUND!r} first, then organs",
        )
        _expect(len(set(self.classes)) == len(self.classes), "classes", self.classes, "every name once")
        _expect(isinstance(self.organ_minima_mm3, Mapping), "organ_minima_mm3", self.organ_minima_mm3, "an object")
        for name, volume in self.organ_minima_mm3.items():
            _expect(name in self.classes[1:], "organ_minima_mm3", name, "organs named in classes")
            _expect(_is_number(volume) and volume >= 0, f"organ_minima_mm3.{name}", volume, "a volume in mm3")
        axes = self.mirrored_axes
        distinct = isinstance(axes, tuple) and all(type(axis) is int for axis in axes) and len(set(axes)) == len(axes)
        _expect(distinct and set(axes) <= set(AXES), "mirrored_axes", axes, "a list of axes: 0, 1, 2, each once")
        _expect(self.precision in PRECISIONS, "precision", self.precision, " or ".join(PRECISIONS))
        _expect(isinstance(self.anti_aliasing, bool), "anti_aliasing", self.anti_aliasing, "true or false")
        _expect(isinstance(self.provenance, Mapping), "provenance", self.provenance, "an object")

    def check_mirroring(self, axes: tuple[int, ...]) -> None:
        """Raise BundleError where test-time mirroring along ``axes`` is asked for and training had none."""
        unknown = [axis for axis in axes if axis not in self.mirrored_axes]
        if unknown:
            trained = _axis_names(self.mirrored_axes) or "none"
            raise BundleError(
                f"test-time mirroring along {_axis_names(axes)}; expected none but the axes that training flipped, here "
                f"{trained} (field 'mirrored_axes')"
            )

    def to_json(self) -> str:
        """The text of plan.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Parse and check the text of plan.json. Raises BundleError with one sentence that says which field is wrong."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise BundleError(f"not valid JSON ({error})") from error
        if isinstance(content, dict) and content.get("format_version") == 1 and "mirrored_axes" not in content:
            # Format 1 did not say; its reader mirrored whatever it was given.
            content |= {"format_version": FORMAT_VERSION, "mirrored_axes": list(AXES)}
        if isinstance(content, dict):
            content.setdefault("precision", PRECISIONS[0])
            content.setdefault("anti_aliasing", False)
        values = _known_fields(Plan, content, "")
        values["model"] = Model(**_known_fields(Model, values["model"], "model."))
        values["intensity"] = Intensity(**_known_fields(Intensity, values["intensity"], "intensity."))
        for name in ("spacing", "patch", "classes", "mirrored_axes"):
            _expect(isinstance(values[name], list), name, values[name], "a list")
            values[name] = tuple(values[name])
        return Plan(**values)


@dataclass(frozen=True)
class Bundle:
    """A plan with the bytes of its network, whose hash was checked, and the file that they were read from, if any."""

    plan: Plan
    model: bytes = field(repr=False)
    file: Path | None = field(default=None, compare=False)


def read_bundle(folder: Path) -> Bundle:
    """Read ``folder/plan.json`` and the network it names. Raises BundleError naming the file, found and expected."""
    plan_path = folder / PLAN_NAME
    try:
        plan = Plan.from_json(plan_path.read_text(encoding="utf-8"))
    except BundleError as error:
        raise BundleError(f"{plan_path}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{plan_path}: cannot be read ({error}); expected a bundle's plan") from error
    model_path = folder / plan.model.file
    try:
        model = model_path.read_bytes()
    except OSError as error:
        raise BundleError(f"{model_path}: cannot be read ({error.strerror}); expected the bundle's network") from error
    found = hashlib.sha256(model).hexdigest()
    if found != plan.model.sha256:
        raise BundleError(
            f"{model_path}: sha256 is {found}; {PLAN_NAME} expects {plan.model.sha256}: not the bundle's network"
        )
    return Bundle(plan, model, model_path)


def write_bundle(folder: Path, bundle: Bundle) -> None:
    """Write a bundle; plan.json last, so that a folder with a plan is a whole bundle. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / bundle.plan.model.file, bundle.model)
    atomic_write(folder / PLAN_NAME, bundle.plan.to_json().encode())


def _known_fields(kind: type, content: object, prefix: str) -> dict[str, Any]:
    """``content`` as keyword arguments of the dataclass ``kind``: every field there, no other."""
    if not isinstance(content, dict):
        raise BundleError(f"{prefix.rstrip('.') or 'the file'} is {content!r}; expected an object")
    names = [entry.name for entry in fields(kind)]
    for name in names:
        if name not in content:
            raise BundleError(f"field {prefix + name!r} is missing; expected {', '.join(names)}")
    for name in content:
        if name not in names:
            raise BundleError(f"field {prefix + str(name)!r} is unknown; expected {', '.join(names)}")
    return dict(content)


def _expect(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise BundleError(f"field {name!r} is {found!r}; expected {expected}")


def _axis_names(axes: tuple[int, ...]) -> str:
    return ", ".join("zyx"[axis] for axis in axes)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: object) -> bool:
    return _is_number(value) and isinstance(value, int | float) and value > 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_triple(value: object, holds: Callable[[object], bool]) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(holds(entry) for entry in value)
