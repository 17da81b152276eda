"""A U-Net's skip connections without the arrays that hold both sides of them.

A convolution of two arrays that were concatenated is the sum of a convolution of each. At full resolution the concatenated
array is the network's largest, and at that moment its two parts lie beside it; the sum needs neither, as the engine adds the
second convolution to the first one's result in place.

One of the parts is what a transposed convolution enlarged. That is linear too: the two are one transposed convolution with a
larger kernel, which needs fewer multiplications, and the enlarged array never exists.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# Bytes of the weights up to which a convolution is taken apart. Heavier ones lie at coarse resolutions, where there is little
# to save, and their weights would no longer be those of the bundle's file (``inference.mapped``).
LIGHT = 4 << 20

PADS = ("pads_begin", "pads_end")
PLACE = ("strides", *PADS, "dilations", "auto_pad")  # what a convolution takes beside image and kernel, in its order

Array = npt.NDArray[Any]


def take_apart(model: Any) -> int:
    """Replace light convolutions over concatenated channels of an OpenVINO model by sums of convolutions; how many."""
    from openvino import opset13 as opset

    replaced = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Convolution" or node.input_value(0).get_node().get_type_name() != "Concat":
            continue
        joined, kernel = node.input_value(0).get_node(), node.input_value(1)
        channels = [part.get_partial_shape()[1] for part in joined.input_values()]
        if joined.get_attributes()["axis"] != 1 or any(n.is_dynamic for n in channels):
            continue
        if np.prod(kernel.get_shape()) * kernel.get_element_type().size > LIGHT:
            continue
        attributes = node.get_attributes()
        where = [attributes[name] for name in PLACE]
        parts = joined.input_values()
        kernels = opset.variadic_split(kernel, 1, [n.get_length() for n in channels]).outputs()
        terms: list[Any] = []
        whole, first = _values(kernel), 0
        for part, own, count in zip(parts, kernels, channels, strict=True):
            weights = None if whole is None else whole[:, first : first + count.get_length()]
            first += count.get_length()
            beside = next((other for other in parts if other != part), None)
            merged = _merge(part, weights, attributes, beside)
            # In front: the engine adds a convolution to what is there already, but no transposed one.
            terms = [*merged, *terms] if merged else [*terms, opset.convolution(part, own, *where)]
        total, *others = terms
        for other in others:
            total = opset.add(total, other)
        node.output(0).replace(total.output(0))
        replaced += 1
    return replaced


def _merge(part: Any, kernel: Array | None, attributes: Mapping[str, Any], beside: Any) -> list[Any]:
    """Terms whose sum is the convolution of an enlarged ``part``: one transposed convolution, and what its bias adds.

    ``kernel``: the part's channels of the convolution's, whose ``attributes`` are given. ``beside``: another array of the same
    size. No terms where the part is not the plain result of a transposed convolution.
    """
    from openvino import opset13 as opset

    node, bias = part.get_node(), None
    if node.get_type_name() == "Add":
        bias = _values(node.input_value(1))
        if bias is None or bias.size != part.get_partial_shape()[1].get_length():
            return []
        node = node.input_value(0).get_node()
    if node.get_type_name() != "ConvolutionBackpropData" or node.get_input_size() != 2:
        return []
    own, enlarging = node.get_attributes(), _values(node.input_value(1))
    if kernel is None or enlarging is None or beside is None or not (_is_plain(attributes) and _is_plain(own)):
        return []
    begin, end = ([n - 1 - p for n, p in zip(kernel.shape[2:], attributes[k], strict=True)] for k in PADS)
    if any(attributes["strides"][axis] != 1 for axis in range(3)) or min(begin + end) < 0:
        return []
    if any(n for k in (*PADS, "output_padding") for n in own[k]):
        return []
    kind = part.get_element_type().to_dtype()
    weights = opset.constant(compose(enlarging, kernel).astype(kind))
    terms = [opset.convolution_backprop_data(node.input_value(0), weights, list(own["strides"]), None, begin, end)]
    if bias is not None:
        # The bias ends where the convolution's padding begins: it is convolved as an array of ones would be. The ones are made
        # of what is there: of a constant array the engine would keep the convolution, as large as a layer, beside the weights.
        channel = opset.slice(beside, *(opset.constant(np.array([n])) for n in (0, 1, 1, 1)))
        weights = opset.constant(np.einsum("om...,m->o...", kernel, bias.ravel())[:, None].astype(kind))
        where = [attributes[name] for name in ("strides", *PADS, "dilations")]
        terms.append(opset.convolution(opset.clamp(channel, 1.0, 1.0), weights, *where))
    return terms


def compose(enlarging: Array, kernel: Array) -> Array:
    """Kernel (in, out, z, y, x) of the transposed convolution that does what one with the kernel ``enlarging`` (in, middle, ...)
    and a convolution with ``kernel`` (out, middle, ...) after it do."""
    inner = enlarging.shape[2:]
    out = np.zeros((len(enlarging), len(kernel), *(n + m - 1 for n, m in zip(inner, kernel.shape[2:], strict=True))))
    for at in np.ndindex(kernel.shape[2:]):
        starts = (m - 1 - i for m, i in zip(kernel.shape[2:], at, strict=True))
        place = tuple(slice(start, start + n) for start, n in zip(starts, inner, strict=True))
        out[:, :, *place] += np.moveaxis(np.tensordot(enlarging, kernel[:, :, *at], (1, 1)), -1, 1)
    return out


def _is_plain(attributes: Mapping[str, Any]) -> bool:
    """Whether a convolution's padding is written down and its kernel has no gaps."""
    return attributes["auto_pad"] == "explicit" and all(n == 1 for n in attributes["dilations"])


def _values(output: Any) -> Array | None:
    """A constant, which may be widened or reshaped, in float64; None where ``output`` is none."""
    node = output.get_node()
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return None
    return np.asarray(node.data, np.float64).reshape(tuple(output.get_shape()))
