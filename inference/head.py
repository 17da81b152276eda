"""The network's last layer in float32 where a CPU computes the others in bfloat16.

A logit of 15 in bfloat16 is known to a sixteenth, which is more than two classes differ by along a border. OpenVINO computes every
convolution in bfloat16, but leaves other layers behind the last of them in float32, transposed convolutions among them; and a
convolution with a kernel of one voxel is the same as the transposed one.
"""

from typing import Any


def widen_head(model: Any) -> bool:
    """Replace the convolution of one voxel that makes an OpenVINO model's logits by a transposed one; whether there is such a layer."""
    from openvino import opset13 as opset

    convolutions = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    if not convolutions:
        return False
    node = convolutions[-1]
    image, kernel = node.input_values()
    attributes = node.get_attributes()
    moves = any(n != 0 for name in ("pads_begin", "pads_end") for n in attributes[name])
    if any(n != 1 for n in (*kernel.get_shape()[2:], *attributes["strides"])) or moves:
        return False
    turned = opset.transpose(kernel, opset.constant([1, 0, 2, 3, 4]))
    node.output(0).replace(opset.convolution_backprop_data(image, turned, [1, 1, 1]).output(0))
    return True
