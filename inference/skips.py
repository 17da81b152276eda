"""A U-Net's skip connections without the arrays that hold both sides of them.

A convolution of two arrays that were concatenated is the sum of a convolution of each. At full resolution the concatenated
array is the network's largest, and at that moment its two parts lie beside it; the sum needs neither, as the engine adds the
second convolution to the first one's result in place.
"""

from typing import Any

import numpy as np

# Bytes of the weights up to which a convolution is taken apart. Heavier ones lie at coarse resolutions, where there is little
# to save, and their weights would no longer be those of the bundle's file (``inference.mapped``).
LIGHT = 1 << 20


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
        where = [attributes[name] for name in ("strides", "pads_begin", "pads_end", "dilations", "auto_pad")]
        kernels = opset.variadic_split(kernel, 1, [n.get_length() for n in channels]).outputs()
        total, *others = (
            opset.convolution(part, own, *where) for part, own in zip(joined.input_values(), kernels, strict=True)
        )
        for other in others:
            total = opset.add(total, other)
        node.output(0).replace(total.output(0))
        replaced += 1
    return replaced
