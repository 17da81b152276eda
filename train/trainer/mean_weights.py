"""The mean of a network's weights over a part of its training."""

from typing import Any

import torch


class MeanWeights:
    """A running mean, in float32, to which every iteration counts alike.

    The mean of many points of a training does better on scans unlike its own than the last point does (Izmailov et al., UAI 2018;
    Cha et al., NeurIPS 2021). Batch normalisation would need its statistics anew; nnU-Net normalises by instance.
    """

    def __init__(self) -> None:
        self.count = 0
        self.weights: list[torch.Tensor] = []

    def add(self, network: torch.nn.Module) -> None:
        """Count the present weights in."""
        self.count += 1
        present = [parameter.detach().float() for parameter in network.parameters()]
        if not self.weights:
            self.weights = [torch.zeros_like(parameter) for parameter in present]
        for mean, parameter in zip(self.weights, present, strict=True):
            mean.lerp_(parameter, 1 / self.count)

    def install(self, network: torch.nn.Module) -> None:
        """Make the mean the network's weights; where nothing was counted they stay."""
        if not self.count:
            return
        with torch.no_grad():
            for mean, parameter in zip(self.weights, network.parameters(), strict=True):
                parameter.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"count": self.count, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept; from nothing where it kept nothing."""
        self.count, self.weights = state.get("count", 0), state.get("weights", [])
