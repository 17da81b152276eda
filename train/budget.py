"""What a loop will take, before it starts: jobs, hours, disk. Rough by nature; every assumption has a name here."""

import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from inference.volume import Shape
from train.config import Config, Network
from train.dataset import Case

log = logging.getLogger(__name__)

# Scans whose headers are looked at; the others are taken to be like them.
SAMPLE = 60
# Multiply-adds count twice; backward passes cost twice a forward pass.
TRAINING_COST = 3
# FLOP per second of a training, over everything: the paper's 40 hours for 1000 epochs of 250 + 50 iterations of its network
# (30.7 million parameters, 922 GFLOP per patch, batch 2) on an RTX 2080 Ti.
RTX_2080_TI = 1000 * (250 * TRAINING_COST + 50) * 2 * 922e9 / (40 * 3600)
# One core of a server in float32.
CPU_CORE = 25e9
# Bytes per voxel of the working grid, measured on phantoms and two real scans (1.2, 1.4), with a reserve for noise: int16
# under gzip; float32 as nnU-Net packs it; a label map, nnU-Net's and ours.
PREPARED_BYTES = 1.5
PREPROCESSED_BYTES = 2.0
LABEL_BYTES = 0.1
# nnU-Net notes where each organ lies, for its sampling: 10,000 voxels, four int64 each.
LOCATION_BYTES = 10_000 * 4 * 8
# Bytes per parameter: weights and one or two moments in float32.
CHECKPOINT_BYTES = {"sgd": 8, "adamw": 12}
WEIGHT_BYTES = {"float16": 2, "float32": 4}
GIGABYTE = 1e9


class BudgetError(RuntimeError):
    """A run that does not fit. The message says what it needs and what there is."""


@dataclass(frozen=True)
class Budget:
    """Expected size of a run.

    ``trainings``, ``labellings``: jobs. ``training_flop``, ``labelling_flop``: of all of them. ``disk_bytes``: of the
    whole run when it is done, all unlabelled cases being accepted.
    """

    trainings: int
    labellings: int
    training_flop: float
    labelling_flop: float
    disk_bytes: float

    @property
    def gpu_hours(self) -> float:
        """Hours of one RTX 2080 Ti, the paper's GPU."""
        return (self.training_flop + self.labelling_flop) / RTX_2080_TI / 3600

    @property
    def core_hours(self) -> float:
        """Hours of one CPU core."""
        return (self.training_flop + self.labelling_flop) / CPU_CORE / 3600

    def describe(self, run: Path) -> str:
        """What a person should know before the start."""
        return (
            f"plan: {self.trainings} trainings and {self.labellings} cases to label; about {self.gpu_hours:,.1f} GPU hours "
            f"at an RTX 2080 Ti's pace, or {self.core_hours:,.1f} hours of a CPU core; up to "
            f"{self.disk_bytes / GIGABYTE:,.1f} GB of disk, {free_bytes(run) / GIGABYTE:,.1f} GB are free"
        )

    def check_disk(self, run: Path) -> None:
        """Raises BudgetError when the disk has less room than the run still needs."""
        missing = self.disk_bytes - used_bytes(run)
        free = free_bytes(run)
        if missing > free:
            raise BudgetError(
                f"{run}: the run needs up to {missing / GIGABYTE:.1f} GB more, {free / GIGABYTE:.1f} GB are free; expected "
                "enough (loop.check_disk=false starts all the same; a run that stops on a full disk goes on later)"
            )


def expected(voxels: Sequence[float], labelled: int, config: Config) -> Budget:
    """The budget of a loop over cases of so many ``voxels`` on the working grid, the ``labelled`` ones first."""
    loop, training = config.loop, config.training
    mean_voxels = float(np.mean(voxels))
    unlabelled = len(voxels) - labelled
    folds = loop.iterations * training.folds
    epochs = [*loop.epochs, *[training.epochs] * (loop.iterations + 1 - len(loop.epochs))]
    all_epochs = training.folds * sum(epochs[:-1]) + epochs[-1]
    labellings = loop.iterations * unlabelled
    patch = flop(config.network, len(config.classes))
    return Budget(
        trainings=folds + 1,
        labellings=labellings,
        training_flop=all_epochs * _epoch_patches(config) * patch,
        labelling_flop=labellings * training.folds * _windows(mean_voxels, config) * patch,
        disk_bytes=_disk(mean_voxels, labelled, unlabelled, config),
    )


def measure_scans(cases: Sequence[Case], config: Config) -> list[float]:
    """Voxels on the working grid of each case, from the headers of a sample; an unreadable one counts as the others do."""
    step = max(1, len(cases) // SAMPLE)
    known = {case.id: _working_voxels(case.image, config) for case in cases[::step]}
    sizes = [size for size in known.values() if size]
    usual = float(np.mean(sizes)) if sizes else 0.0
    return [known.get(case.id) or usual for case in cases]


def parameters(network: Network, classes: int) -> int:
    """Weights of nnU-Net's plain U-Net with deep supervision."""
    return sum(count for count, _ in _layers(network, classes))


def flop(network: Network, classes: int) -> float:
    """Operations of one forward pass of one patch; a multiply-add is two."""
    return sum(operations for _, operations in _layers(network, classes))


def free_bytes(run: Path) -> int:
    """Room on the disk of a folder that may not be there yet."""
    folder = run.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def used_bytes(run: Path) -> int:
    """What a run has on disk already; a file with several names counts once."""
    seen = {}
    for folder, _, files in os.walk(run):
        for name in files:
            try:
                status = os.stat(os.path.join(folder, name))
            except OSError:
                continue
            seen[status.st_ino] = status.st_size
    return sum(seen.values())


def _layers(network: Network, classes: int) -> list[tuple[int, float]]:
    """Parameters and operations of every layer: convolutions (with bias and instance norm), transposed ones, outputs."""
    shapes = _stage_shapes(network)
    layers = []
    channels = 1
    for stage, features in enumerate(network.features):
        for _ in range(network.encoder_convolutions[stage]):
            layers.append(_convolution(channels, features, network.kernels[stage], shapes[stage]))
            channels = features
    # nnU-Net lists the decoder's convolutions from the coarsest stage on.
    for stage, convolutions in zip(
        reversed(range(len(network.features) - 1)), network.decoder_convolutions, strict=True
    ):
        features, stride = network.features[stage], math.prod(network.strides[stage + 1])
        voxels = math.prod(shapes[stage])
        layers.append((network.features[stage + 1] * features * stride + features, 2.0 * channels * features * voxels))
        channels = 2 * features
        for _ in range(convolutions):
            layers.append(_convolution(channels, features, network.kernels[stage], shapes[stage]))
            channels = features
        layers.append((features * classes + classes, 2.0 * features * classes * voxels))
    return layers


def _convolution(channels: int, features: int, kernel: Shape, shape: Shape) -> tuple[int, float]:
    weights = channels * features * math.prod(kernel)
    return weights + 3 * features, 2.0 * weights * math.prod(shape)


def _stage_shapes(network: Network) -> list[Shape]:
    shape = network.patch
    shapes = []
    for stride in network.strides:
        shape = (shape[0] // stride[0], shape[1] // stride[1], shape[2] // stride[2])
        shapes.append(shape)
    return shapes


def _epoch_patches(config: Config) -> float:
    """Forward passes that an epoch is worth."""
    training = config.training
    iterations = training.iterations_per_epoch * TRAINING_COST + training.validation_iterations
    return iterations * config.network.batch_size


def _windows(voxels: float, config: Config) -> float:
    """Windows of one case: at least one, and overlap in every direction."""
    fresh = math.prod(config.network.patch) * config.labelling.step**3
    return max(1.0, voxels / fresh) * (8 if config.labelling.mirroring else 1)


def _disk(voxels: float, labelled: int, unlabelled: int, config: Config) -> float:
    cases, loop = labelled + unlabelled, config.loop
    scans = cases * voxels * (PREPARED_BYTES + PREPROCESSED_BYTES)
    # Images are linked from iteration to iteration, label maps are not.
    maps = labelled + unlabelled * loop.iterations
    # Organs lie beside organs with auxiliary classes.
    map_bytes = LABEL_BYTES * (2 if config.data.auxiliary_classes else 1)
    classes = len(config.classes)
    labels = maps * (voxels * map_bytes + (classes - 1) * LOCATION_BYTES)
    weights = parameters(config.network, classes)
    checkpoint = CHECKPOINT_BYTES[config.training.optimizer] * weights
    trainings = loop.iterations * config.training.folds + 1
    # While a training runs, its latest checkpoint lies beside the one that is being written.
    models = (
        trainings * (checkpoint + WEIGHT_BYTES[config.export.weights] * weights)
        + 2 * checkpoint * config.training.folds
    )
    return scans + labels + models


def _working_voxels(path: Path, config: Config) -> float:
    """Volume of a scan by its header, in voxels of the working grid; 0 where it cannot be read."""
    try:
        header = nib.load(path).header
        volume = math.prod(header.get_data_shape()[:3]) * math.prod(float(side) for side in header.get_zooms()[:3])
    except Exception as error:  # whatever is wrong with it is said when it is prepared
        log.debug("%s: %s", path, error)
        return 0.0
    size = volume / math.prod(config.prepare.spacing)
    return size if math.isfinite(size) else 0.0
