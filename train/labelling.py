"""Pseudo-labels: the models of an iteration look at a scan, side by side, and agree on one label map or not.

Per case one read, one pass of the sliding window, one label map and one row. The models' logits pass by in slabs of
slices; nothing of the size classes x scan exists, in memory or on disk.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inference.bundle import Bundle, Plan
from inference.engine import Device, Engine, load_engine
from inference.organs import CLASSES
from inference.pipeline import Options, Segmenter, Stopwatch, organ_volumes
from inference.postprocess import Context, postprocess
from inference.resample import Floats, argmax, slices_of
from inference.volume import (
    SUFFIXES,
    Labels,
    Shape,
    Volume,
    VolumeError,
    atomic_write,
    read_labels,
    read_volume,
    write_volume,
)
from train.agreement import Agreement, Overlap
from train.config import Labelling
from train.prepare import organs_alone, with_auxiliary

log = logging.getLogger(__name__)

# Test-time mirroring is along all three axes or none (table 5 of the paper).
ALL_AXES = (0, 1, 2)
# mm: a prepared scan says the working spacing exactly; NIfTI keeps it in float32.
SPACING_TOLERANCE = 1e-3


class LabellingError(ValueError):
    """Models that cannot label together, or a row that cannot be read. The message says what was found and expected."""


@dataclass(frozen=True)
class Row:
    """What is known of one pseudo-label.

    ``models``: how many models its agreement is over. ``volumes_ml``: mL by organ. ``entropy``: mean over all voxels that
    some model calls an organ, in nats. ``change``: against the label map of the iteration before, None where there was
    none; see ``changed_share``. ``seconds``: by stage.
    """

    case: str
    models: int
    agreement: Agreement
    volumes_ml: Mapping[str, float]
    entropy: float
    change: float | None
    seconds: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.entropy < 0:
            raise ValueError(f"entropy is {self.entropy}; expected 0 or more")
        if self.change is not None and not 0 <= self.change <= 1:
            raise ValueError(f"change is {self.change}; expected a number from 0 to 1")


@dataclass(frozen=True)
class Files:
    """Where a case lies: its prepared ``image``, and the ``label`` and ``row`` to be written.

    ``training_label``: to be written too, organs and auxiliary classes, where the models know any. ``previous``: the
    label of the iteration before, where there was one.
    """

    image: Path
    label: Path
    row: Path
    training_label: Path | None = None
    previous: Path | None = None


class Labeller:
    """The models of one iteration, loaded, ready for any number of prepared scans."""

    def __init__(
        self, bundles: Sequence[Bundle], settings: Labelling, threads: int = 0, device: Device = "auto"
    ) -> None:
        """Load ``bundles``, at least two that share grid, window, classes and intensities.

        ``threads``: of a CPU engine; 0 takes the cores of this process. Raises LabellingError for bundles that differ,
        BundleError or EngineError as ``load_engine`` does.
        """
        self.plan = common_plan([bundle.plan for bundle in bundles])
        # What is measured and post-processed: the organs alone.
        self.organ_plan = replace(self.plan, classes=CLASSES)
        self.models = len(bundles)
        self.settings = settings
        ensemble = Ensemble([load_engine(bundle, device, threads) for bundle in bundles])
        options = Options(settings.step, ALL_AXES if settings.mirroring else (), postprocess=False)
        self._segmenter = Segmenter(bundles[0], ensemble, options)

    def label(self, files: Files, leave_out: Collection[int] = ()) -> Row:
        """Label one prepared scan: write its pseudo-label, on the working grid, and then its row. Returns the row.

        ``leave_out``: models, by index, that trained on this case; they label it, but agreement is over the others, at
        least two. Raises VolumeError for a file that cannot be used, LabellingError where fewer than two models are left,
        OSError if the disk refuses.
        """
        watch = Stopwatch()
        with watch.stage("read"):
            scan = read_volume(files.image, self.plan.orientation)
            self._check_grid(files.image, scan)
        consensus = self._consensus(scan, self._compared(leave_out), watch)
        labels = organs_alone(consensus.labels)
        if not labels.any():
            log.warning("%s: no organ found: the pseudo-label is empty", files.image)
        if self.settings.postprocess:
            with watch.stage("rules"):
                labels, _ = postprocess(labels, Context.of(self.organ_plan, scan.spacing))
        change = None
        if files.previous is not None:
            with watch.stage("change"):
                change = changed_share(labels, _read_same_grid(files.previous, scan, files.image))
        with watch.stage("write"):
            if files.training_label is not None:
                write_volume(files.training_label, with_auxiliary(labels, consensus.labels), scan.affine)
            write_volume(files.label, labels, scan.affine)
        volumes = organ_volumes(labels, self.organ_plan, scan.voxel_volume)
        row = Row(
            case=case_name(files.label),
            models=self.models - len(set(leave_out)),
            agreement=consensus.agreement(),
            volumes_ml={name: float(ml) for name, ml in volumes.items()},
            entropy=consensus.entropy(),
            change=change,
            seconds={stage: round(seconds, 3) for stage, seconds in watch.seconds.items()},
        )
        # Last: a case whose row exists is done.
        write_row(files.row, row)
        return row

    def _consensus(self, scan: Volume, compared: Sequence[int], watch: Stopwatch) -> "Consensus":
        consensus = Consensus(scan.shape, self.models, compared)
        slabs = self._segmenter.logits(scan.voxels)
        while True:
            with watch.stage("network"):
                slab = next(slabs, None)
            if slab is None:
                return consensus
            with watch.stage("labels"):
                consensus.add(slab)
            # A slab is a large part of the working set: gone before the next one is made.
            del slab

    def _compared(self, leave_out: Collection[int]) -> list[int]:
        unknown = set(leave_out) - set(range(self.models))
        compared = [index for index in range(self.models) if index not in leave_out]
        if unknown or len(compared) < 2:
            raise LabellingError(
                f"models {sorted(leave_out)} of {self.models} are left out; expected at least two to be compared"
            )
        return compared

    def _check_grid(self, path: Path, scan: Volume) -> None:
        if not np.allclose(scan.spacing, self.plan.spacing, rtol=0, atol=SPACING_TOLERANCE):
            raise VolumeError(
                f"{path}: spacing {_mm(scan.spacing)}; expected a prepared scan of {_mm(self.plan.spacing)} (z, y, x)"
            )


class Ensemble:
    """Several networks behind one call: a window's logits, model after model, (models * classes, z, y, x).

    So one sliding window serves them all: they see the same windows, and their slabs agree slice by slice.
    """

    # The windows of training, as nnU-Net predicts.
    unit: Shape | None = None
    growth = 1.0

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.name = f"{len(engines)} x {engines[0].name}"
        self._engines = tuple(engines)

    def __call__(self, window: Floats) -> Floats:
        return np.concatenate([engine(window) for engine in self._engines])


class Consensus:
    """What the models say of one scan, gathered slab by slab.

    ``labels``: the ensemble's label map (z, y, x), auxiliary classes and all, filled from the first slice on.
    """

    def __init__(self, shape: Shape, models: int, compared: Sequence[int]) -> None:
        """``shape``: of the scan (z, y, x). ``compared``: the models, by index, that agreement is over."""
        self.labels: Labels = np.empty(shape, np.uint8)
        self._models = models
        self._compared = tuple(compared)
        self._overlap = Overlap(len(compared))
        self._slices = 0
        self._entropy = 0.0
        self._voxels = 0

    def add(self, slab: Floats) -> None:
        """Take the next slices: logits (models * classes, n, y, x)."""
        for stacked in slices_of([slab]):
            logits = stacked.reshape(self._models, -1, *stacked.shape[1:])
            masks = [argmax(model) for model in logits]
            labels, total, voxels = merge(logits, masks)
            self.labels[self._slices] = labels
            self._overlap.add([organs_alone(masks[index]) for index in self._compared])
            self._entropy += total
            self._voxels += voxels
            self._slices += 1

    def agreement(self) -> Agreement:
        """Equation 1 over the compared models."""
        return self._overlap.agreement()

    def entropy(self) -> float:
        """Mean voxel entropy of the ensemble in nats, see ``Row``."""
        return self._entropy / self._voxels if self._voxels else 0.0


def merge(logits: Floats, masks: Sequence[Labels]) -> tuple[Labels, float, int]:
    """The ensemble's label map of one slice, the sum of its entropy in nats, and over how many voxels.

    ``logits``: (models, classes, y, x); ``masks``: the largest class of each model. The label is the largest class of
    the mean softmax, over all classes; entropy is over the voxels that some model calls an organ. Where all models prefer
    the same class, so does their mean, so only those voxels, and those where models differ, need a softmax: a few per
    cent of a scan.
    """
    labels = masks[0].copy()
    organs = np.any([organs_alone(mask) for mask in masks], axis=0)
    unsure = organs | np.any([mask != masks[0] for mask in masks[1:]], axis=0)
    if not unsure.any():
        return labels, 0.0, 0
    probabilities = mean_softmax(logits[:, :, unsure])
    labels[unsure] = argmax(probabilities)
    entropies = entropy(probabilities)[organs[unsure]]
    return labels, float(entropies.sum(dtype=np.float64)), len(entropies)


def mean_softmax(logits: Floats) -> Floats:
    """Softmax over the classes of ``logits`` (models, classes, n), averaged over the models: (classes, n)."""
    total = np.zeros(logits.shape[1:], np.float32)
    for model in logits:
        shares = np.exp(model - model.max(axis=0))
        shares /= shares.sum(axis=0)
        total += shares
    return total / np.float32(len(logits))


def entropy(probabilities: Floats) -> Floats:
    """Entropy over the classes of ``probabilities`` (classes, n), in nats: (n,). 0 where one class has it all."""
    smallest = np.finfo(np.float32).tiny  # 0 log 0 is 0
    result: Floats = -(probabilities * np.log(np.maximum(probabilities, smallest))).sum(axis=0)
    return np.maximum(result, 0)  # a sum of shares may round to more than 1


def changed_share(labels: Labels, before: Labels) -> float:
    """Of all voxels that are an organ in one of two label maps, the share whose label differs; 0 where there is none."""
    organs = np.count_nonzero(labels | before)
    return float(np.count_nonzero(labels != before) / organs) if organs else 0.0


def common_plan(plans: Sequence[Plan]) -> Plan:
    """The plan that all models of an ensemble share. Raises LabellingError where they differ."""
    if len(plans) < 2:
        raise LabellingError(f"{len(plans)} model{'s' * (len(plans) != 1)}; expected at least two to be compared")
    first = plans[0]
    for number, plan in enumerate(plans[1:], start=1):
        for name in ("orientation", "spacing", "patch", "classes", "intensity"):
            found, expected = getattr(plan, name), getattr(first, name)
            if found != expected:
                raise LabellingError(f"model {number}: {name} is {found}; expected {expected}, as model 0")
    if first.classes[: len(CLASSES)] != CLASSES:
        raise LabellingError(
            f"classes of the models are {', '.join(first.classes)}; expected {', '.join(CLASSES)}, then auxiliary ones"
        )
    return first


def working_set(shape: Shape, plan: Plan, models: int, mirroring: bool = False) -> int:
    """Bytes that labelling a scan of ``shape`` (z, y, x) needs at most, beside the loaded networks.

    The scan as int16, as float32 and padded, and its label map; the sums of one window's height and the slab that
    leaves them, for every class of every model; a window's logits, thrice with mirroring; a slice's softmax.
    """
    padded = [max(found, wanted) for found, wanted in zip(shape, plan.patch, strict=True)]
    channels = models * len(plan.classes)
    scan = (2 + 4 + 1) * int(np.prod(shape)) + 4 * int(np.prod(padded))
    slabs = 2 * 4 * (channels + 1) * plan.patch[0] * padded[1] * padded[2]
    window = (3 if mirroring else 1) * 4 * channels * int(np.prod(plan.patch))
    plane = (2 * 4 * channels + 3 * models) * shape[1] * shape[2]
    return scan + slabs + window + plane


def case_name(path: Path) -> str:
    """CASE of CASE.nii.gz."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")
    return path.name.removesuffix(suffix)


def write_row(path: Path, row: Row) -> None:
    """Write a row as JSON (docs/formats.md), whole or not at all. Numbers come back as they were."""
    content = asdict(row) | {"agreement": dict(row.agreement.values)}
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())


def read_row(path: Path) -> Row:
    """Read a row back. Raises LabellingError naming the file."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Row(**content | {"agreement": Agreement(content["agreement"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LabellingError(f"{path}: cannot be read ({error}); expected the row of a pseudo-label") from error


def _read_same_grid(path: Path, scan: Volume, image: Path) -> Labels:
    labels = read_labels(path).voxels
    if labels.shape != scan.shape:
        raise VolumeError(f"{path}: {labels.shape} voxels (z, y, x); expected {scan.shape} as {image.name}")
    return np.asarray(labels, np.uint8)


def _mm(spacing: npt.ArrayLike) -> str:
    return " x ".join(f"{side:g}" for side in np.asarray(spacing)) + " mm"
