"""What makes a training on a CPU twice as fast: the loss in one pass, norms that keep channels last, memory that is kept.

Figures: docs/log.md. Like the trainer, beside which nnU-Net finds it, this file imports nothing of this application.
"""

import ctypes
import logging
from typing import Any

import torch
from torch import nn
from torch.nn.functional import batch_norm

log = logging.getLogger("train.trainer")

# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEPT_BYTES = 2**31 - 1
GROWTH_BYTES = 2**28


class DiceAndCrossEntropy(nn.Module):
    """nnU-Net's loss, cross-entropy minus the mean soft Dice of the foreground, equal to DC_and_CE_loss to rounding.

    nnU-Net takes the softmax twice, over the second axis of a tensor whose channels lie last, and autograd keeps every
    intermediate; here it is taken once, over rows of classes, and the gradient is written down.
    """

    def __init__(self, batch_dice: bool, smooth: float) -> None:
        super().__init__()
        self.batch_dice = batch_dice
        self.smooth = smooth

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of ``logits`` (batch, classes, z, y, x) for the labels ``target`` (batch, 1, z, y, x)."""
        batch, classes = logits.shape[:2]
        rows = logits.movedim(1, -1).reshape(batch, -1, classes).float()
        labels = target.reshape(batch, -1).long()
        if self.batch_dice:
            rows, labels = rows.reshape(1, -1, classes), labels.reshape(1, -1)
        loss: torch.Tensor = _DiceAndCrossEntropy.apply(rows, labels, self.smooth)
        return loss


class _DiceAndCrossEntropy(torch.autograd.Function):
    """The loss of logits (groups, voxels, classes), Dice taken over each group, with its gradient."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, smooth: float) -> torch.Tensor:
        groups, voxels, classes = logits.shape
        logs = torch.log_softmax(logits, -1)
        log_of_label = logs.gather(-1, labels[..., None])[..., 0]
        probabilities = logs.exp_()
        of_label = log_of_label.exp()
        overlap = torch.zeros(groups, classes).scatter_add_(1, labels, of_label)
        truth = torch.zeros(groups, classes).scatter_add_(1, labels, torch.ones(1).expand(groups, voxels))
        numerator = 2 * overlap + smooth
        denominator = (probabilities.sum(1) + truth + smooth).clamp_min(1e-8)
        ctx.save_for_backward(probabilities, labels, of_label, numerator, denominator)
        return -log_of_label.mean() - (numerator / denominator)[:, 1:].mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """With p the probabilities and t a voxel's label, the loss changes by

            by_sum[c] for every p[c], and by by_overlap[t] more for p[t]   (Dice)
            -1 / (voxels p[t]) for p[t]                                    (cross-entropy)

        and a softmax turns a gradient g into p (g - sum p g).
        """
        probabilities, labels, of_label, numerator, denominator = ctx.saved_tensors
        groups, voxels, classes = probabilities.shape
        share = 1 / (groups * (classes - 1))
        by_sum = numerator / denominator**2 * share
        by_overlap = -2 / denominator * share
        by_sum[:, 0] = by_overlap[:, 0] = 0  # the background has no Dice
        at_label = (by_overlap.gather(1, labels) * of_label - 1 / (groups * voxels))[..., None]
        mean = torch.einsum("gvc,gc->gv", probabilities, by_sum)[..., None] + at_label
        out = probabilities * (by_sum[:, None] - mean)
        out.scatter_add_(-1, labels[..., None], at_label)
        return out.mul_(gradients[0]), None, None


class ChannelsLastInstanceNorm(nn.InstanceNorm3d):
    """Instance norm as the batch norm of one sample, which torch computes where channels lie last.

    torch's own instance norm copies its input to channels first and the next layer copies it back.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Of (batch, channels, z, y, x)."""
        samples = [
            batch_norm(sample, None, None, self.weight, self.bias, training=True, momentum=0.0, eps=self.eps)
            for sample in torch.split(input, 1)
        ]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


class SoundConvolution(nn.Conv3d):
    """A convolution that takes two slices in float32.

    oneDNN's bfloat16 gradient for a kernel three deep reads memory that nobody wrote where its input has just two slices: the
    weights become NaN, or quietly wrong (seen with torch 2.14.1; one slice, three and more are right). So few voxels cost nothing.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Of (batch, channels, z, y, x)."""
        if input.shape[2] != 2 or self.kernel_size[0] == 1:
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


def keep_channels_last(network: nn.Module) -> None:
    """Lay ``network`` out for channels last, with norms that keep that layout and convolutions that are right."""
    network.to(memory_format=torch.channels_last_3d)
    for module in network.modules():
        # A layer has several owners in nnU-Net's blocks: another class for it reaches all of them.
        if type(module) is nn.InstanceNorm3d and not module.track_running_stats:
            module.__class__ = ChannelsLastInstanceNorm
        elif type(module) is nn.Conv3d:
            module.__class__ = SoundConvolution


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next iteration.

    By default it returns every large tensor to the kernel, and a fifth of an iteration goes into clearing fresh pages.
    Another C library has no such setting and is left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for setting, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEPT_BYTES), (M_TOP_PAD, GROWTH_BYTES)):
        if not mallopt(setting, value):
            log.warning("glibc did not take malloc setting %d; the training is slower", setting)
