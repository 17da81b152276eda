"""Every setting of a run, checked before any work. Defaults and their meaning: config.toml beside this file."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, get_type_hints

from inference.bundle import PRECISIONS
from inference.organs import CLASSES
from inference.volume import Shape, Spacing

# nnU-Net's numbers of data sets have three digits, and each iteration has a data set.
MAX_ITERATIONS = 900
DEFAULTS = Path(__file__).with_name("config.toml")


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the key, the value and what was expected."""


@dataclass(frozen=True)
class Whole:
    """A whole number from ``low`` to ``high``."""

    low: int
    high: int

    def read(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise ConfigError(f"a whole number from {self.low} to {self.high}")
        return value


@dataclass(frozen=True)
class Real:
    """A number from ``low`` to ``high``; ``low`` itself only where ``inclusive``."""

    low: float
    high: float
    inclusive: bool = True

    def read(self, value: object) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not self.low <= float(value) <= self.high or (value == self.low and not self.inclusive):  # type: ignore[arg-type]
            raise ConfigError(f"a number from {self.low:g} {'' if self.inclusive else '(excluded) '}to {self.high:g}")
        return float(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Switch:
    """true or false."""

    def read(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ConfigError("true or false")
        return value


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]

    def read(self, value: object) -> str:
        if value not in self.words:
            raise ConfigError("one of " + ", ".join(repr(word) for word in self.words))
        return str(value)


@dataclass(frozen=True)
class Name:
    """The plain name of a folder or a class: no path."""

    def read(self, value: object) -> str:
        if not isinstance(value, str) or not value or value.startswith(".") or set(value) & set("/\\\n\0"):
            raise ConfigError("a plain name without slashes")
        return value


@dataclass(frozen=True)
class Text:
    """Any text, such as a path."""

    def read(self, value: object) -> str:
        if not isinstance(value, str):
            raise ConfigError("a text")
        return value


@dataclass(frozen=True)
class Each:
    """A list whose entries are all ``item``; ``length`` of them where it is given."""

    item: Any
    length: int | None = None

    def read(self, value: object) -> tuple[Any, ...]:
        count = "" if self.length is None else f"{self.length} entries, "
        if not isinstance(value, list | tuple) or (self.length is not None and len(value) != self.length):
            raise ConfigError(f"a list of {count}each {self.item_text()}")
        try:
            return tuple(self.item.read(entry) for entry in value)
        except ConfigError as error:
            raise ConfigError(f"a list of {count}each {error}") from error

    def item_text(self) -> str:
        try:
            self.item.read(None)
        except ConfigError as error:
            return str(error)
        return "as documented in config.toml"


@dataclass(frozen=True)
class Data:
    """Folders and classes of a data set in FLARE22's layout."""

    images: Annotated[str, Name()]
    labels: Annotated[str, Name()]
    unlabelled: Annotated[str, Name()]
    test_images: Annotated[str, Name()]
    test_labels: Annotated[str, Name()]
    auxiliary_classes: Annotated[tuple[str, ...], Each(Name())]
    auxiliary_labels: Annotated[str, Name()]

    def __post_init__(self) -> None:
        names = CLASSES + self.auxiliary_classes
        if len(set(names)) < len(names):
            _refuse(
                "data.auxiliary_classes",
                self.auxiliary_classes,
                "names that differ from each other and from the organs'",
            )


@dataclass(frozen=True)
class Prepare:
    """The working grid, mm (z, y, x), how scans are brought onto it, and how many side by side."""

    spacing: Annotated[Spacing, Each(Real(0.2, 20), 3)]
    anti_aliasing: Annotated[bool, Switch()]
    workers: Annotated[int, Whole(0, 1024)]


@dataclass(frozen=True)
class Network:
    """Patch and U-Net; lists have one entry per stage, finest first, triples are (z, y, x)."""

    plan: Annotated[str, Choice(("settings", "nnunet"))]
    patch: Annotated[Shape, Each(Whole(4, 1024), 3)]
    batch_size: Annotated[int, Whole(1, 256)]
    features: Annotated[tuple[int, ...], Each(Whole(1, 4096))]
    kernels: Annotated[tuple[Shape, ...], Each(Each(Whole(1, 15), 3))]
    strides: Annotated[tuple[Shape, ...], Each(Each(Whole(1, 4), 3))]
    encoder_convolutions: Annotated[tuple[int, ...], Each(Whole(1, 16))]
    decoder_convolutions: Annotated[tuple[int, ...], Each(Whole(1, 16))]
    batch_dice: Annotated[bool, Switch()]

    def __post_init__(self) -> None:
        stages = len(self.features)
        if stages < 3:
            _refuse("network.features", self.features, "at least three stages")
        for name, missing in (("kernels", 0), ("strides", 0), ("encoder_convolutions", 0), ("decoder_convolutions", 1)):
            if len(getattr(self, name)) != stages - missing:
                _refuse(f"network.{name}", getattr(self, name), f"{stages - missing} entries for {stages} stages")
        for axis, size in enumerate(self.patch):
            reduction = 1
            for stride in self.strides:
                reduction *= stride[axis]
            if size % reduction:
                _refuse(
                    "network.patch",
                    self.patch,
                    f"axis {'zyx'[axis]} a multiple of {reduction}, the product of its strides",
                )


@dataclass(frozen=True)
class Training:
    """nnU-Net's training and what the trainer subclass sets."""

    folds: Annotated[int, Whole(2, 100)]
    epochs: Annotated[int, Whole(1, 100_000)]
    iterations_per_epoch: Annotated[int, Whole(1, 100_000)]
    validation_iterations: Annotated[int, Whole(1, 100_000)]
    checkpoint_every: Annotated[int, Whole(1, 100_000)]
    max_minutes: Annotated[float, Real(0, 1e6)]
    optimizer: Annotated[str, Choice(("sgd", "adamw"))]
    learning_rate: Annotated[float, Real(0, 10, inclusive=False)]
    warmup_iterations: Annotated[int, Whole(0, 1_000_000)]
    momentum: Annotated[float, Real(0, 0.9999)]
    weight_decay: Annotated[float, Real(0, 1)]
    average_from: Annotated[float, Real(0, 1)]
    foreground_oversampling: Annotated[float, Real(0, 1)]
    augmentation: Annotated[str, Choice(("nnunet", "gentle", "intensity", "none"))]
    mirroring: Annotated[bool, Switch()]
    device: Annotated[str, Choice(("auto", "cpu", "cuda"))]
    cpu_precision: Annotated[str, Choice(("auto", "bfloat16", "float32"))]
    augmentation_workers: Annotated[int, Whole(-1, 256)]
    threads: Annotated[int, Whole(0, 1024)]
    seed: Annotated[int, Whole(0, 2**31 - 1)]
    deterministic: Annotated[bool, Switch()]
    final_validation: Annotated[bool, Switch()]
    start_from: Annotated[str, Text()]

    def __post_init__(self) -> None:
        if self.deterministic and self.max_minutes:
            _refuse(
                "training.max_minutes", self.max_minutes, "0 with training.deterministic: a clock is not reproducible"
            )


@dataclass(frozen=True)
class Loop:
    """Self-training (paper section 2.2)."""

    iterations: Annotated[int, Whole(0, MAX_ITERATIONS)]
    criterion: Annotated[str, Choice(("minimum", "mean", "entropy", "change", "all", "random"))]
    threshold: Annotated[float, Real(0, 2.64)]
    random_cases: Annotated[int, Whole(0, 10_000_000)]
    held_out: Annotated[bool, Switch()]
    warm_start: Annotated[bool, Switch()]
    epochs: Annotated[tuple[int, ...], Each(Whole(1, 100_000))]
    check_disk: Annotated[bool, Switch()]

    def __post_init__(self) -> None:
        if self.criterion != "entropy" and self.threshold > 1:
            _refuse("loop.threshold", self.threshold, f"a number from 0 to 1 with loop.criterion {self.criterion!r}")
        if (self.criterion == "random") != (self.random_cases > 0):
            _refuse("loop.random_cases", self.random_cases, "above 0 with loop.criterion 'random', 0 with any other")
        if len(self.epochs) > self.iterations + 1:
            _refuse("loop.epochs", self.epochs, f"at most {self.iterations + 1} entries, one per iteration")


@dataclass(frozen=True)
class Labelling:
    """How pseudo-labels are made: sliding window, test-time mirroring, post-processing."""

    step: Annotated[float, Real(0, 1, inclusive=False)]
    mirroring: Annotated[bool, Switch()]
    postprocess: Annotated[bool, Switch()]


@dataclass(frozen=True)
class Cluster:
    """How the jobs of a loop run side by side, and how often they are tried."""

    labelling_threads: Annotated[int, Whole(0, 1024)]
    retries: Annotated[int, Whole(0, 1000)]
    attempts: Annotated[int, Whole(1, 1000)]
    progress_seconds: Annotated[float, Real(0, 1e5, inclusive=False)]


@dataclass(frozen=True)
class Inference:
    """How the exported network is run (paper section 2.3)."""

    step: Annotated[float, Real(0, 1, inclusive=False)]


@dataclass(frozen=True)
class Export:
    """How model.onnx is stored, and what the inference may compute it in."""

    weights: Annotated[str, Choice(("bfloat16", "float16", "float32"))]
    precision: Annotated[str, Choice(PRECISIONS)]
    max_megabytes: Annotated[float, Real(0, 1e5, inclusive=False)]


@dataclass(frozen=True)
class Config:
    """All settings of a run, one field per section of config.toml."""

    data: Data
    prepare: Prepare
    network: Network
    training: Training
    loop: Loop
    labelling: Labelling
    cluster: Cluster
    inference: Inference
    export: Export

    def __post_init__(self) -> None:
        least = 4 if self.loop.held_out else 2
        if self.training.folds < least:
            _refuse("training.folds", self.training.folds, f"at least {least} with loop.held_out {self.loop.held_out}")
        if self.labelling.mirroring and not self.training.mirroring:
            _refuse("labelling.mirroring", True, "false where training.mirroring is false: the models never saw a flip")

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any]) -> Self:
        """Checked settings from nested tables that hold every key. Raises ConfigError."""
        sections = {name: _section(name, kind, tables[name]) for name, kind in get_type_hints(cls).items()}
        return cls(**sections)

    def to_json(self) -> str:
        """The text of a run's settings.json."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of the trained network: background, the thirteen organs, the auxiliary classes."""
        return CLASSES + self.data.auxiliary_classes


def load_config(file: Path | None = None, settings: Sequence[str] = ()) -> Config:
    """The defaults, overlaid with a TOML file and then with ``section.key=value`` texts. Raises ConfigError."""
    tables = tomllib.loads(DEFAULTS.read_text(encoding="utf-8"))
    if file is not None:
        _overlay(tables, _read_toml(file), str(file))
    for setting in settings:
        _overlay(tables, _parse_setting(setting), "--set")
    return Config.from_tables(tables)


def read_settings(path: Path) -> Config:
    """The settings that a run recorded (``Config.to_json``). Raises ConfigError."""
    tables = tomllib.loads(DEFAULTS.read_text(encoding="utf-8"))
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected the settings of a run") from error
    _overlay(tables, recorded, str(path))
    return Config.from_tables(tables)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a TOML file of settings") from error


def _parse_setting(text: str) -> dict[str, dict[str, Any]]:
    """``training.epochs=2`` as nested tables. A value that is no TOML is a bare word: ``network.plan=nnunet``."""
    key, equals, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(f"--set {text!r}; expected section.key=value, such as training.epochs=100")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    return {section: {name: parsed}}


def _overlay(tables: dict[str, Any], changes: Mapping[str, Any], source: str) -> None:
    """Lay ``changes`` over ``tables`` in place. A key that the defaults do not have is an error."""
    for section, values in changes.items():
        if section not in tables:
            raise ConfigError(f"{source}: unknown section {section!r}; expected one of {', '.join(tables)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source}: {section} is {values!r}; expected a section of settings")
        for key, value in values.items():
            if key not in tables[section]:
                raise ConfigError(
                    f"{source}: unknown key {section}.{key}; expected one of {', '.join(tables[section])}"
                )
            tables[section][key] = value


def _section(name: str, kind: Any, values: Mapping[str, Any]) -> Any:
    rules = get_type_hints(kind, include_extras=True)
    read = {}
    for key, hint in rules.items():
        try:
            read[key] = hint.__metadata__[0].read(values[key])
        except ConfigError as error:
            _refuse(f"{name}.{key}", values[key], str(error))
    return kind(**read)


def _refuse(key: str, value: object, expected: str) -> None:
    raise ConfigError(f"{key} is {value!r}; expected {expected}")
