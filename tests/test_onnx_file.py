"""What is written is checked by the `onnx` package and run by ONNX Runtime; the inference image has neither tool."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from inference.onnx_file import (
    FLOAT,
    FLOAT16,
    INT64,
    Node,
    OnnxFileError,
    Port,
    append,
    model,
    open_port,
    opset,
    ports,
    to_half,
)
from tests.conftest import level_model

WINDOW = np.random.default_rng(0).uniform(0, 13, (1, 1, 8, 16, 16)).astype(np.float32)


def answers(content: bytes, **feeds: np.ndarray) -> list[np.ndarray]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, feeds)
    return found


def network(*nodes: onnx.NodeProto, weights: dict[str, np.ndarray] | None = None, **options: Any) -> onnx.ModelProto:
    """float32 network from `input` to `output`, both of five open dimensions."""
    names = ["a", "b", "c", "d", "e"]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, names) for name in ("input", "output")]
    tensors = [numpy_helper.from_array(values, name) for name, values in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:], tensors, **options)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    return made


def test_ports_are_read_with_their_types_and_sizes() -> None:
    inputs, outputs = ports(level_model(3, shape=(1, 1, 8, "y", 16), names=("scan", "logits"), half=True))
    assert inputs == [Port("scan", FLOAT16, (1, 1, 8, None, 16))]
    assert outputs == [Port("logits", FLOAT16, (1, 3, 8, None, 16))]


def test_weights_that_are_listed_as_inputs_are_no_ports() -> None:
    """As exporters wrote it before IR version 4."""
    made = network(helper.make_node("Add", ["input", "w"], ["output"]), weights={"w": np.ones(1, np.float32)})
    made.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [1]))
    assert [port.name for port in ports(made.SerializeToString())[0]] == ["input"]


def test_the_version_of_onnx_own_operations_is_found_among_others() -> None:
    made = network(helper.make_node("Identity", ["input"], ["output"]))
    made.opset_import.insert(0, helper.make_opsetid("com.example", 3))
    assert opset(made.SerializeToString()) == 17
    del made.opset_import[1]
    with pytest.raises(OnnxFileError, match="no version"):
        opset(made.SerializeToString())


def test_a_graph_that_is_written_is_valid_and_computes() -> None:
    nodes = [
        Node("Transpose", ["first"], ["turned"], {"perm": [1, 0]}),
        Node("Constant", [], ["minus_one"], {"value_ints": [-1]}),
        Node("Unsqueeze", ["turned", "minus_one"], ["deeper"]),
        Node("ArgMax", ["deeper"], ["last"], {"axis": 0, "keepdims": 0}),
    ]
    content = model(nodes, [open_port("first", FLOAT, 2)], [Port("last", INT64, (None, 1))])
    onnx.checker.check_model(content, full_check=True)
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    np.testing.assert_array_equal(answers(content, first=values)[0][:, 0], values.argmax(axis=1))


def test_nodes_behind_a_network_take_its_output_and_more_inputs() -> None:
    content = level_model()
    made = append(
        content,
        [Node("Mul", ["output", "share"], ["weighted"])],
        [open_port("share", FLOAT, 1)],
        [open_port("weighted", FLOAT, 5)],
    )
    onnx.checker.check_model(made, full_check=True)
    assert [[port.name for port in each] for each in ports(made)] == [["input", "share"], ["weighted"]]
    plain = answers(content, input=WINDOW)[0]
    share = np.array([0.25], np.float32)
    np.testing.assert_array_equal(answers(made, input=WINDOW, share=share)[0], plain * share)


@pytest.mark.parametrize("raw", [True, False], ids=["raw bytes", "list of numbers"])
def test_a_network_in_half_precision_answers_as_the_whole_one_does(raw: bool) -> None:
    made = onnx.load_from_string(level_model())
    if not raw:
        for tensor in made.graph.initializer:
            values = numpy_helper.to_array(tensor)
            tensor.ClearField("raw_data")
            tensor.float_data.extend(values.ravel().tolist())
    half = to_half(made.SerializeToString())
    onnx.checker.check_model(half, full_check=True)
    assert {port.type for each in ports(half) for port in each} == {FLOAT16}
    assert {tensor.data_type for tensor in onnx.load_from_string(half).graph.initializer} == {TensorProto.FLOAT16}
    found = answers(half, input=WINDOW.astype(np.float16))[0]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, answers(made.SerializeToString(), input=WINDOW)[0], rtol=2e-3, atol=0.1)


def test_half_precision_leaves_the_scales_of_a_resize_and_turns_constants_and_casts() -> None:
    made = network(
        helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.array([2], np.float32))),
        helper.make_node("Mul", ["input", "two"], ["twice"]),
        helper.make_node("Cast", ["twice"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Resize", ["cast", "", "scales"], ["output"], mode="nearest"),
        weights={"scales": np.array([1, 1, 2, 1, 1], np.float32)},
        value_info=[helper.make_tensor_value_info("twice", TensorProto.FLOAT, None)],
    )
    half = to_half(made.SerializeToString())
    kept = {tensor.name: tensor.data_type for tensor in onnx.load_from_string(half).graph.initializer}
    assert kept == {"scales": TensorProto.FLOAT}
    found = answers(half, input=WINDOW.astype(np.float16))[0]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, 2 * np.repeat(WINDOW.astype(np.float16), 2, axis=2))


def test_weights_beyond_half_precision_are_clipped_and_never_infinite() -> None:
    made = network(
        helper.make_node("Add", ["input", "w"], ["output"]), weights={"w": np.array([1e9, -1e9, 1], np.float32)}
    )
    tensor = onnx.load_from_string(to_half(made.SerializeToString())).graph.initializer[0]
    assert numpy_helper.to_array(tensor).tolist() == [65504, -65504, 1]


def test_a_network_with_a_graph_inside_is_not_made_half() -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["input"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    made = network(
        helper.make_node("If", ["which"], ["output"], then_branch=branch, else_branch=branch),
        weights={"which": np.array(True)},
    )
    with pytest.raises(OnnxFileError, match="operation If holds a graph"):
        to_half(made.SerializeToString())


def test_a_file_cut_off_anywhere_is_refused_or_read_never_worse() -> None:
    content = level_model(3)
    refused = 0
    for size in range(len(content)):
        try:
            ports(content[:size])
            to_half(content[:size])
        except OnnxFileError:
            refused += 1
    assert refused > len(content) // 2


def test_bytes_that_are_no_network_are_refused() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(level_model(3))
        for place in random.integers(0, len(content), 5):
            content[place] = random.integers(256)
        try:
            ports(bytes(content))
            to_half(bytes(content))
        except OnnxFileError:
            continue
    with pytest.raises(OnnxFileError, match="bytes end within a field"):
        ports(b"no network")
