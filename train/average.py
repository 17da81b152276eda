"""``python -m train average``: one bundle whose weights are the mean of several bundles' weights.

For networks that one training led to from another: the mean of a network and of what it became by training on keeps more of what
the first knew of scans unlike those of the training (Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022).
It costs nothing at inference.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from inference.bundle import Bundle, BundleError, Plan, read_bundle, write_bundle
from train.trainer.kernels import widened

log = logging.getLogger(__name__)

# What two networks must share for a mean of them to be one: how a scan reaches them and what their outputs mean.
GRID = ("spacing", "anti_aliasing", "patch")
SHARED = ("orientation", *GRID, "classes", "intensity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m train average``."""
    parser.add_argument(
        "bundles",
        metavar="BUNDLE",
        type=Path,
        nargs="+",
        help="folders of bundles, the youngest last: its plan is kept",
    )
    parser.add_argument(
        "--across-grids",
        action="store_true",
        help="also of networks on other grids or patches than the last one's, which the mean works on",
    )
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help='round the mean as export.weights = "bfloat16" does; for networks in float16',
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the mean")


def run(arguments: argparse.Namespace) -> int:
    """Write the mean; returns the exit code."""
    try:
        bundles = [read_bundle(folder) for folder in arguments.bundles]
        write_bundle(arguments.out, average(bundles, arguments.across_grids, arguments.bfloat16))
    except (BundleError, OSError) as error:
        log.error("%s", error)
        return 1
    log.info("wrote %s, the mean of %d networks", arguments.out, len(arguments.bundles))
    return 0


def average(bundles: Sequence[Bundle], across_grids: bool = False, bfloat16: bool = False) -> Bundle:
    """The mean of the bundles' weights, in the last one's arithmetic and with its plan.

    Kernels that are narrower than the last one's count as zero around, as a training that started from them saw them.
    ``across_grids``: spacing and patch may differ. ``bfloat16``: weights in float16 are rounded to bfloat16 first. Raises
    BundleError where the networks are not of one kind.
    """
    import onnx
    import torch
    from onnx import numpy_helper

    last = bundles[-1]
    weights = []
    for number, bundle in enumerate(bundles, 1):
        for name in SHARED:
            if across_grids and name in GRID:
                continue
            found, expected = getattr(bundle.plan, name), getattr(last.plan, name)
            if found != expected:
                raise BundleError(f"bundle {number}: {name} is {found}; expected the last one's, {expected}")
        tensors = onnx.load_from_string(bundle.model).graph.initializer
        weights.append({tensor.name: numpy_helper.to_array(tensor) for tensor in tensors})
    model = onnx.load_from_string(last.model)
    for number, found in enumerate(weights, 1):
        for name in found.keys() & weights[-1].keys():
            found[name] = widened(found[name], weights[-1][name].shape)
        sizes, expected = ({name: values.shape for name, values in each.items()} for each in (found, weights[-1]))
        if sizes != expected:
            differing = sorted(name for name in sizes | expected if sizes.get(name) != expected.get(name))
            raise BundleError(f"bundle {number}: another network than the last one's; weights differ in {differing[0]}")
    for tensor in model.graph.initializer:
        values = weights[-1][tensor.name]
        if values.dtype.kind == "f":
            mean = np.mean([each[tensor.name].astype(np.float64) for each in weights], axis=0)
            if bfloat16 and values.dtype == np.float16:
                mean = torch.from_numpy(mean).bfloat16().double().numpy()
            tensor.CopyFrom(numpy_helper.from_array(mean.astype(values.dtype), tensor.name))
    content = model.SerializeToString()
    plan = replace(last.plan, model=replace(last.plan.model, sha256=sha256(content).hexdigest()))
    return Bundle(replace(plan, provenance=_provenance([bundle.plan for bundle in bundles])), content)


def _provenance(plans: Sequence[Plan]) -> dict[str, Any]:
    """The last one's, and of which networks the mean is."""
    return {**plans[-1].provenance, "mean_of": [plan.model.sha256 for plan in plans]}
