"""nnU-Net's trainer with our settings. nnU-Net finds this class by itself: ``nnUNet_extTrainer`` names this folder.

nnU-Net imports the file on its own, so it imports nothing of this application. Settings come from the key ``training`` of
the plans (see train/nnunet.py), so that nnU-Net's own commands train the same way.
"""

import json
import logging
import os
import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform

# nnU-Net puts this folder on the path.
from cpu_training import DiceAndCrossEntropy, keep_channels_last, keep_freed_memory
from kernels import widened
from mean_weights import MeanWeights
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

log = logging.getLogger("train.trainer")

POLY_EXPONENT = 0.9  # nnU-Net's polynomial decay
GRADIENT_NORM = 12.0  # nnU-Net's clipping
SMOOTH = 1e-5  # of nnU-Net's Dice
HEADS = "decoder.seg_layers."  # nnU-Net's outputs, one per stage of the decoder
HEADS_RATE = 0.01  # at which random ones learn alone
# The augmentation "gentle": radians about each axis, and by how much a patch grows or shrinks, along every axis as much or not.
GENTLE_ROTATION = float(np.deg2rad(8))
GENTLE_SCALING = (0.75, 1.33)
GENTLE_PROBABILITY = 0.4
GENTLE_EVEN_SCALING = 0.5
# Bends of a patch: how often, how far in voxels (z, y, x), and over how many voxels they are smooth (sigma).
GENTLE_BENDING = 0.4
GENTLE_BEND = (2.0, 6.0, 6.0)
GENTLE_BEND_WIDTH = (8.0, 18.0)


class QuietLogger(MetaLogger):  # type: ignore[misc]
    """nnU-Net's logger without its plot: drawing it after each epoch takes seconds, in which a short epoch is trained."""

    def plot_progress_png(self, output_folder: str) -> None:
        """Draw nothing; progress.json has the numbers."""


class Decay:
    """Polynomial decay of the learning rate to 0, over whatever share of the training is done; before, a rise from 0 if asked."""

    def __init__(self, optimizer: torch.optim.Optimizer, initial: float, trainer: "SettingsTrainer") -> None:
        self.optimizer = optimizer
        self.initial = initial
        self.trainer = trainer

    def step(self, epoch: int) -> None:
        """Set the rate; nnU-Net calls this at the start of each epoch, a training with clock or rise before each iteration."""
        rate = self.initial * (1 - self.trainer.fraction_done()) ** POLY_EXPONENT * self.trainer.warmth()
        if self.trainer.only_heads():
            rate = HEADS_RATE
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def load_exported(network: torch.nn.Module, path: Path) -> list[str]:
    """Copy the weights of an exported network into ``network``, which may know fewer classes: the first ones.

    Where the network's kernels are wider, zeros surround the exported ones, so that it begins as the same function. The export
    drops the outputs of lower resolution that deep supervision adds; these stay as they are, and their parameters' names are
    returned. Raises RuntimeError where sizes differ or a weight is missing.
    """
    import onnx
    from onnx import numpy_helper

    found = {}
    for tensor in onnx.load(path).graph.initializer:
        name = tensor.name.removesuffix("_float16").removeprefix("network.")
        found[name] = numpy_helper.to_array(tensor).astype(np.float32)
    heads = {name for name in found if name.startswith(HEADS)}
    copies, fresh = [], []
    for name, parameter in network.named_parameters():
        if name.startswith(HEADS) and name not in heads:
            fresh.append(name)
            continue
        if name not in found:
            raise RuntimeError(f"{name} is missing")
        values = found[name][: len(parameter)] if name in heads else widened(found[name], parameter.shape)
        if values.shape != parameter.shape:
            raise RuntimeError(f"{name} has shape {tuple(values.shape)}; expected {tuple(parameter.shape)}")
        copies.append((parameter, values))
    if heads - {name for name, _ in network.named_parameters()}:
        raise RuntimeError(f"it has more stages: {', '.join(sorted(heads))}")
    with torch.no_grad():
        for parameter, values in copies:
            parameter.copy_(torch.from_numpy(values))
    return fresh


class SettingsTrainer(nnUNetTrainer):  # type: ignore[misc]
    """What it sets: length, learning rate, optimizer, augmentation, checkpoints, arithmetic on a CPU, a time limit."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's own signature)
    ) -> None:
        resumed = bool(plans.get("continue_training", False))
        settings = plans["training"]
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings: dict[str, Any] = settings
        self.logger = QuietLogger(self.output_folder, resumed)
        self.num_epochs = settings["epochs"]
        self.num_iterations_per_epoch = settings["iterations_per_epoch"]
        self.num_val_iterations_per_epoch = settings["validation_iterations"]
        self.save_every = settings["checkpoint_every"]
        self.initial_lr = settings["learning_rate"]
        self.weight_decay = settings["weight_decay"]
        self.oversample_foreground_percent = settings["foreground_oversampling"]
        self.limit_seconds = settings["max_minutes"] * 60
        self.on_cpu = self.device.type == "cpu"
        self.bfloat16 = self.on_cpu and wants_bfloat16(settings["cpu_precision"])
        self.mean_weights = MeanWeights()
        self.random_heads: list[str] = []  # parameters of outputs that a start from a bundle leaves random
        self.step = 0  # iterations done in this epoch
        self.epoch_start = time.time()

    # Length and learning rate

    def elapsed_seconds(self) -> float:
        """Seconds trained so far, over all restarts; nnU-Net's log, part of each checkpoint, holds those of whole epochs."""
        starts = self.logger.get_value("epoch_start_timestamps", None)
        ends = self.logger.get_value("epoch_end_timestamps", None)
        whole = float(sum(end - start for start, end in zip(starts, ends, strict=False)))
        return whole + (time.time() - self.epoch_start if len(starts) > len(ends) else 0.0)

    def fraction_done(self) -> float:
        """Share of the training that is done, in [0, 1]: of its epochs, or of its time where that is further."""
        epochs = float(self.current_epoch / self.num_epochs)
        clock = self.elapsed_seconds() / self.limit_seconds if self.limit_seconds else 0.0
        return min(1.0, max(epochs, clock))

    def out_of_time(self) -> bool:
        """Whether the time limit, if any, is reached."""
        return bool(self.limit_seconds) and self.elapsed_seconds() >= self.limit_seconds

    def warmth(self) -> float:
        """Share of the learning rate, in (0, 1]: it rises over the training's first iterations."""
        rise = int(self.settings["warmup_iterations"])
        epochs = self.current_epoch - bool(self.random_heads)
        done = int(epochs * self.num_iterations_per_epoch) + self.step
        return min(1.0, (done + 1) / rise) if rise else 1.0

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Decay]:
        """SGD with Nesterov momentum, or AdamW, with polynomial decay."""
        parameters = self.network.parameters()
        optimizer: torch.optim.Optimizer
        if self.settings["optimizer"] == "adamw":
            optimizer = torch.optim.AdamW(parameters, self.initial_lr, weight_decay=self.weight_decay)
        else:
            momentum = self.settings["momentum"]
            optimizer = torch.optim.SGD(
                parameters, self.initial_lr, momentum, weight_decay=self.weight_decay, nesterov=momentum > 0
            )
        return optimizer, Decay(optimizer, self.initial_lr, self)

    def run_training(self) -> None:
        """nnU-Net's loop, which ends early when the time is up."""
        self.on_train_start()
        while self.current_epoch < self.num_epochs and not self.out_of_time():
            self.on_epoch_start()
            self.on_train_epoch_start()
            outputs = []
            for _ in range(self.num_iterations_per_epoch):
                outputs.append(self.train_step(next(self.dataloader_train)))
                if self.out_of_time():
                    break
            self.on_train_epoch_end(outputs)
            with torch.no_grad():
                self.on_validation_epoch_start()
                steps = range(self.num_val_iterations_per_epoch)
                self.on_validation_epoch_end([self.validation_step(next(self.dataloader_val)) for _ in steps])
            self.on_epoch_end()
        self.on_train_end()

    def on_epoch_start(self) -> None:
        """Start the clock; in deterministic mode draw all random states from seed, fold and epoch."""
        super().on_epoch_start()
        self.epoch_start = time.time()
        self.step = 0
        if self.settings["deterministic"]:
            seed_everything(self.settings["seed"], self.fold, self.current_epoch)
        if self.random_heads:
            network: Any = getattr(self.network, "_orig_mod", self.network)
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(not self.only_heads() or name in self.random_heads)

    def only_heads(self) -> bool:
        """Whether only random outputs learn now: in the first epoch, lest they spoil the features that they read."""
        return bool(self.random_heads) and self.current_epoch == 0

    def on_epoch_end(self) -> None:
        """nnU-Net's, then progress for people (log) and for programs (progress.json)."""
        super().on_epoch_end()
        progress = self.progress()
        replace_file(Path(self.output_folder) / "progress.json", (json.dumps(progress) + "\n").encode())
        log.info(
            "fold %s epoch %d: loss %.4f, validation loss %.4f, pseudo Dice %.4f, rate %.5f, %.1f s, %.1f %% done",
            self.fold,
            progress["epoch"],
            progress["train_loss"],
            progress["validation_loss"],
            progress["pseudo_dice"],
            progress["learning_rate"],
            progress["epoch_seconds"],
            100 * progress["fraction"],
        )

    def progress(self) -> dict[str, Any]:
        """The numbers of the epoch that just ended, as progress.json holds them."""
        last = {key: self.logger.get_value(key, -1) for key in ("train_losses", "val_losses", "mean_fg_dice", "lrs")}
        start = self.logger.get_value("epoch_start_timestamps", -1)
        end = self.logger.get_value("epoch_end_timestamps", -1)
        return {
            "fold": self.fold,
            "epoch": self.current_epoch,
            "epochs": self.num_epochs,
            "fraction": self.fraction_done(),
            "train_loss": float(last["train_losses"]),
            "validation_loss": float(last["val_losses"]),
            "pseudo_dice": float(last["mean_fg_dice"]),
            "pseudo_dice_per_class": [float(dice) for dice in self.logger.get_value("dice_per_class_or_region", -1)],
            "learning_rate": float(last["lrs"]),
            "epoch_seconds": float(end - start),
            "seconds": self.elapsed_seconds(),
        }

    # Augmentation

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, bool, Any, tuple[int, ...]]:  # noqa: N802
        """nnU-Net's; without rotation no margin around the patch is read, without mirroring no axis may flip."""
        rotation, flat, initial_patch, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.settings["augmentation"] != "nnunet":
            flat, initial_patch = False, self.configuration_manager.patch_size
        if self.settings["augmentation"] == "gentle":
            rotation = (-GENTLE_ROTATION, GENTLE_ROTATION)
            initial_patch = get_patch_size(initial_patch, rotation, rotation, rotation, GENTLE_SCALING)
        if not self.settings["mirroring"]:
            axes, self.inference_allowed_mirroring_axes = (), None
        return rotation, flat, initial_patch, axes

    def get_training_transforms(self, *args: Any, **keywords: Any) -> Any:
        """nnU-Net's, less what the setting ``augmentation`` leaves out."""
        transforms = super().get_training_transforms(*args, **keywords)
        left_out: dict[str, tuple[type, ...]] = {
            "nnunet": (),
            "gentle": (),
            "intensity": (SpatialTransform,),
            "none": (SpatialTransform, RandomTransform),
        }
        drop = left_out[self.settings["augmentation"]]
        kept = [transform for transform in transforms.transforms if not isinstance(transform, drop)]
        if self.settings["augmentation"] == "gentle":
            for transform in kept:
                if isinstance(transform, SpatialTransform):
                    be_gentle(transform)
        return ComposeTransforms(kept)

    # Arithmetic on a CPU

    def initialize(self) -> None:
        """nnU-Net's; on a CPU with channels last."""
        if self.settings["deterministic"]:
            seed_everything(self.settings["seed"], self.fold, -1)
            torch.use_deterministic_algorithms(True, warn_only=True)
        super().initialize()
        if self.settings.get("initial_weights"):
            self.load_initial_weights(Path(self.settings["initial_weights"]))
        if self.on_cpu:
            keep_channels_last(self.network)
            keep_freed_memory()

    def load_initial_weights(self, source: Path) -> None:
        """Warm start: the weights of a checkpoint, of a bundle's model.onnx, or of the same fold of another training's end.

        Raises ValueError where they are another network's.
        """
        fold = 0 if self.fold == "all" else self.fold
        path = source if source.is_file() else source / f"fold_{fold}" / "checkpoint_final.pth"
        network: Any = getattr(self.network, "_orig_mod", self.network)  # torch.compile wraps it
        try:
            if path.suffix == ".onnx":
                random_heads = load_exported(network, path)
                # nnU-Net's loss gives the coarsest output no weight.
                self.random_heads = [name for name in random_heads if not name.startswith(f"{HEADS}0.")]
            else:
                checkpoint = torch.load(path, map_location=self.device, weights_only=False)
                wanted = network.state_dict()
                network.load_state_dict(
                    {
                        name: torch.from_numpy(widened(values.cpu().numpy(), wanted[name].shape))
                        if name in wanted
                        else values
                        for name, values in checkpoint["network_weights"].items()
                    }
                )
        except RuntimeError as error:
            raise ValueError(
                f"{path}: weights of another network; expected this run's, in size and classes ({error})"
            ) from error

    def _build_loss(self) -> torch.nn.Module:
        """nnU-Net's with deep supervision; on a CPU the same in one pass."""
        loss: torch.nn.Module = super()._build_loss()
        if self.on_cpu:
            loss.loss = DiceAndCrossEntropy(self.configuration_manager.batch_dice, SMOOTH)
        return loss

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One iteration, whose weights the mean takes in where it is time for it."""
        if self.limit_seconds or self.settings["warmup_iterations"]:
            self.lr_scheduler.step(self.current_epoch)
        self.step += 1
        result: dict[str, Any] = self.train_on_cpu(batch) if self.on_cpu else super().train_step(batch)
        if self.settings["average_from"] < 1 and self.fraction_done() >= self.settings["average_from"]:
            self.mean_weights.add(self.network)
        return result

    def train_on_cpu(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's iteration. It turns autocast off on a CPU; here the network alone runs in bfloat16, the loss in float32."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.cpu_autocast():
            outputs = self.network(batch["data"].to(memory_format=torch.channels_last_3d))
        loss = self.loss(outputs, batch["target"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_NORM)
        self.optimizer.step()
        return {"loss": loss.detach().numpy()}

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's, in the arithmetic of the training."""
        with self.cpu_autocast():
            return super().validation_step(batch)  # type: ignore[no-any-return]

    def cpu_autocast(self) -> Any:
        """bfloat16 where the training uses it."""
        return torch.autocast("cpu", torch.bfloat16) if self.bfloat16 else nullcontext()

    # Checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's, whole or not at all. The best checkpoint is not kept: the method uses the last (paper, table 2)."""
        if Path(filename).name == "checkpoint_best.pth":
            return
        part, final = filename + ".part", Path(filename).name == "checkpoint_final.pth"
        if final:
            self.mean_weights.install(self.network)
        super().save_checkpoint(part)
        if self.mean_weights.count and not final:
            content = torch.load(part, map_location="cpu", weights_only=False)
            torch.save(content | {"mean_weights": self.mean_weights.state_dict()}, part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, filename)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """nnU-Net's, and the mean of the weights so far. A path, as nnU-Net itself fails on the dictionary it announces."""
        super().load_checkpoint(filename_or_checkpoint)
        content = torch.load(filename_or_checkpoint, map_location=self.device, weights_only=False)
        self.mean_weights.load_state_dict(content.get("mean_weights", {}))

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's, but ``all`` means the cases of our split file, not whatever lies in the folder."""
        if self.fold != "all":
            return super().do_split()  # type: ignore[no-any-return]
        splits = json.loads(
            (Path(self.preprocessed_dataset_folder_base) / "splits_final.json").read_text(encoding="utf-8")
        )
        train = sorted({case for split in splits for case in split["train"] + split["val"]})
        return train, sorted({case for split in splits for case in split["val"]})

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's sliding-window validation with mirroring, which costs more than a short training: a setting."""
        if self.settings["final_validation"]:
            super().perform_actual_validation(save_probabilities)


def wants_bfloat16(precision: str) -> bool:
    """Whether a training on this CPU uses bfloat16. "auto": where the CPU has instructions for it."""
    if precision != "auto":
        return precision == "bfloat16"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def seed_everything(seed: int, fold: int | str, epoch: int) -> None:
    """Set every random state from the run's seed, the fold and the epoch; -1 is the initialisation."""
    number = -1 if fold == "all" else int(fold)
    state = np.random.SeedSequence([seed, number + 1, epoch + 1]).generate_state(1)[0]
    random.seed(int(state))
    np.random.seed(int(state))
    torch.manual_seed(int(state))


def be_gentle(transform: SpatialTransform) -> None:
    """Turn, scale and bend a patch as far as patients differ, and often, not as far as nnU-Net goes, which never bends.

    Labels to the nearest voxel: nnU-Net interpolates the border of every class, which takes nine tenths of the time with twenty
    classes.
    """
    transform.rotation = (-GENTLE_ROTATION, GENTLE_ROTATION)
    transform.scaling = GENTLE_SCALING
    transform.p_rotation = transform.p_scaling = GENTLE_PROBABILITY
    transform.p_synchronize_scaling_across_axes = GENTLE_EVEN_SCALING
    transform.p_elastic_deform = GENTLE_BENDING
    transform.elastic_deform_scale = bend_width
    transform.elastic_deform_magnitude = bend
    transform.mode_seg = "nearest"


def bend_width(image: torch.Tensor, dim: int, patch_size: Sequence[int]) -> float:
    """Sigma of a bend along axis ``dim`` as batchgeneratorsv2 asks for it, as a share of the patch."""
    return float(np.random.uniform(*GENTLE_BEND_WIDTH)) / patch_size[dim]


def bend(image: torch.Tensor, dim: int, patch_size: Sequence[int], deformation_scale: float) -> float:
    """Voxels that the point which moves farthest along axis ``dim`` moves."""
    return float(np.random.uniform(0, GENTLE_BEND[dim]))


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
