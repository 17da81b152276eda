"""The ends of a network in float32 where a CPU computes its layers in bfloat16, which knows eight bits of a number.

OpenVINO computes every convolution in bfloat16. The first one then sees an image of eight bits, too coarse for soft tissues,
which differ by a few HU; the last one makes logits of eight bits, and along a border two classes differ by less.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from inference.resample import Floats
from inference.skips import PADS, PLACE


def widen_head(model: Any) -> bool:
    """Replace the convolution of one voxel that makes an OpenVINO model's logits by a transposed one; whether there is such a layer.

    The two are the same, and what lies behind the last convolution OpenVINO leaves in float32, transposed ones included.
    """
    from openvino import opset13 as opset

    convolutions = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    if not convolutions:
        return False
    node = convolutions[-1]
    image, kernel = node.input_values()
    attributes = node.get_attributes()
    moves = any(n != 0 for name in PADS for n in attributes[name])
    if any(n != 1 for n in (*kernel.get_shape()[2:], *attributes["strides"])) or moves:
        return False
    turned = opset.transpose(kernel, opset.constant([1, 0, 2, 3, 4]))
    node.output(0).replace(opset.convolution_backprop_data(image, turned, [1, 1, 1]).output(0))
    return True


def widen_input(model: Any) -> bool:
    """Have an OpenVINO model take an image in two parts, as ``in_two_parts`` makes them; whether it can.

    It can where one convolution alone reads the image: it gets its kernel twice, once for each part, and adds them up.
    """
    from openvino import opset13 as opset

    image = model.inputs[0]
    node, *others = [reader.get_node() for reader in image.get_target_inputs()]
    if others or node.get_type_name() != "Convolution" or image.get_element_type().to_dtype() != np.float32:
        return False
    attributes = node.get_attributes()
    where = [attributes[name] for name in PLACE]
    shape = image.get_partial_shape()
    shape[1] = 2
    both = opset.parameter(shape, np.float32, image.get_node().get_friendly_name())
    kernel = node.input_value(1)
    node.output(0).replace(opset.convolution(both, opset.concat([kernel, kernel], 1), *where).output(0))
    model.remove_parameter(image.get_node())
    model.add_parameters([both])
    return True


def in_two_parts(image: Floats) -> npt.NDArray[np.float32]:
    """An image (z, y, x) as two channels (2, z, y, x) whose sum it is: what bfloat16 holds of it, and the rest."""
    parts = np.empty((2, *image.shape), np.float32)
    high, low = parts
    high[...] = image
    high.view(np.uint32)[...] &= np.uint32(0xFFFF0000)
    np.subtract(image, high, out=low)
    return parts
