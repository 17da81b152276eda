"""ONNX files at the level of their bytes: small graphs written, a network's float32 made float16, nodes put behind it.

The inference image holds an engine but not the `onnx` package (50 MB with protobuf), and what the GPU engine needs of it is
little: protobuf's wire format (https://protobuf.dev/programming-guides/encoding) and the field numbers of onnx.proto3.
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FLOAT, UINT8, INT16, INT64, FLOAT16 = 1, 2, 5, 7, 10
# Field numbers of onnx.proto3.
MODEL_IR, MODEL_GRAPH, MODEL_OPSET = 1, 7, 8
GRAPH_NODE, GRAPH_NAME, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_VALUE_INFO = 1, 2, 5, 11, 12, 13
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_TYPE, NODE_ATTRIBUTE = 1, 2, 3, 4, 5
ATTRIBUTE_NAME, ATTRIBUTE_FLOAT, ATTRIBUTE_INT, ATTRIBUTE_STRING, ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH = 1, 2, 3, 4, 5, 6
ATTRIBUTE_INTS, ATTRIBUTE_TYPE = 8, 20
TENSOR_DIMS, TENSOR_TYPE, TENSOR_FLOATS, TENSOR_NAME, TENSOR_RAW = 1, 2, 4, 8, 9
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# Values of these inputs stay float32 in a float16 network: scales and regions, not tensors.
FLOAT_ARGUMENTS = ("Resize", "Upsample")
OPSET = 18

Value = int | float | bytes | memoryview
Attribute = int | str | Sequence[int]
Field = tuple[int, int, Value]


class OnnxFileError(ValueError):
    """Bytes that are no ONNX file, or a network that cannot be rewritten. The message says what was found."""


@dataclass(frozen=True)
class Node:
    """An operation: ``inputs`` and ``outputs`` by name; ``attributes``: whole numbers, lists of them, or words."""

    kind: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Attribute] | None = None

    def encode(self) -> bytes:
        parts = [*(_bytes(NODE_INPUT, name) for name in self.inputs)]
        parts += [_bytes(NODE_OUTPUT, name) for name in self.outputs]
        parts.append(_bytes(NODE_TYPE, self.kind))
        parts += [_bytes(NODE_ATTRIBUTE, _attribute(name, value)) for name, value in (self.attributes or {}).items()]
        return b"".join(parts)


@dataclass(frozen=True)
class Port:
    """An input or output of a graph; in ``shape`` None is a size that is open. An empty shape: even their number is."""

    name: str
    type: int
    shape: tuple[int | None, ...]

    def encode(self) -> bytes:
        shape = b"".join(_bytes(1, b"" if size is None else _whole(1, size)) for size in self.shape)
        tensor = _whole(1, self.type) + _bytes(2, shape)
        return _bytes(1, self.name) + _bytes(2, _bytes(1, tensor))


def open_port(name: str, kind: int, rank: int) -> Port:
    """A port of ``rank`` dimensions, each of open size."""
    return Port(name, kind, (None,) * rank)


def model(nodes: Sequence[Node], inputs: Sequence[Port], outputs: Sequence[Port]) -> bytes:
    """An ONNX file of a few operations."""
    graph = b"".join(
        [
            *(_bytes(GRAPH_NODE, node.encode()) for node in nodes),
            _bytes(GRAPH_NAME, "graph"),
            *(_bytes(GRAPH_INPUT, port.encode()) for port in inputs),
            *(_bytes(GRAPH_OUTPUT, port.encode()) for port in outputs),
        ]
    )
    return _whole(MODEL_IR, 8) + _bytes(MODEL_OPSET, _whole(2, OPSET)) + _bytes(MODEL_GRAPH, graph)


def ports(content: bytes) -> tuple[list[Port], list[Port]]:
    """Inputs (initializers left out) and outputs of a network. Raises OnnxFileError."""
    entries = list(_fields(_graph(content)))
    weights = {
        _text(value)
        for number, _, tensor in entries
        if number == GRAPH_INITIALIZER
        for key, _, value in _fields(_buffer(tensor))
        if key == TENSOR_NAME
    }
    inputs = [_found(_buffer(value)) for number, _, value in entries if number == GRAPH_INPUT]
    outputs = [_found(_buffer(value)) for number, _, value in entries if number == GRAPH_OUTPUT]
    return [port for port in inputs if port.name not in weights], outputs


def raw_tensors(content: memoryview) -> dict[str, memoryview]:
    """The weights that lie in the file as plain bytes, by name: parts of ``content``. Raises OnnxFileError."""
    found = {}
    for number, _, tensor in _fields(_graph(content)):
        if number == GRAPH_INITIALIZER:
            entries = {key: value for key, _, value in _fields(_buffer(tensor)) if key in (TENSOR_NAME, TENSOR_RAW)}
            if len(entries) == 2:
                found[_text(entries[TENSOR_NAME])] = _buffer(entries[TENSOR_RAW])
    return found


def opset(content: bytes) -> int:
    """Version of ONNX's own operations that a file asks for. Raises OnnxFileError."""
    for number, _, value in _fields(content):
        if number == MODEL_OPSET:
            entries = dict((key, entry) for key, _, entry in _fields(_buffer(value)))
            if not bytes(_buffer(entries.get(1, b""))).strip():
                return _integer(entries.get(2, 0))
    raise OnnxFileError("names no version of its operations")


def append(content: bytes, nodes: Sequence[Node], inputs: Sequence[Port], outputs: Sequence[Port]) -> bytes:
    """A network with ``nodes`` behind it: ``inputs`` in addition to its own, ``outputs`` in place of its own."""
    kept = [_encode(*entry) for entry in _fields(_graph(content)) if entry[0] != GRAPH_OUTPUT]
    kept += [_bytes(GRAPH_NODE, node.encode()) for node in nodes]
    kept += [_bytes(GRAPH_INPUT, port.encode()) for port in inputs]
    kept += [_bytes(GRAPH_OUTPUT, port.encode()) for port in outputs]
    return _with_graph(content, b"".join(kept))


def to_half(content: bytes) -> bytes:
    """A float32 network as a float16 one: weights, arithmetic, input and output. Raises OnnxFileError.

    Every float32 tensor becomes float16 and every cast to float32 a cast to float16, but for the arguments of resizing
    operations. Values beyond float16's range are clipped to it.
    """
    entries = list(_fields(_graph(content)))
    kept = {name for number, _, value in entries if number == GRAPH_NODE for name in _float_arguments(_buffer(value))}
    parts = []
    for number, wire, value in entries:
        if number == GRAPH_INITIALIZER:
            value = _half_tensor(_buffer(value), kept)
        elif number == GRAPH_NODE:
            value = _half_node(_buffer(value), kept)
        elif number in (GRAPH_INPUT, GRAPH_OUTPUT):
            value = _half_port(_buffer(value))
        elif number == GRAPH_VALUE_INFO:
            continue  # types of inner tensors: the engine finds them itself
        parts.append(_encode(number, wire, value))
    return _with_graph(content, b"".join(parts))


def _found(port: memoryview) -> Port:
    """ValueInfoProto > TypeProto > Tensor: elem_type, shape > dim > dim_value."""
    tensor = _inner(_inner(port, 2), 1)
    kind = next((_integer(value) for number, _, value in _fields(tensor) if number == 1), 0)
    shape = []
    for number, _, dimension in _fields(_inner(tensor, 2)):
        if number == 1:
            sizes = [_integer(value) for key, _, value in _fields(_buffer(dimension)) if key == 1]
            shape.append(sizes[0] if sizes else None)
    name = next((_text(value) for number, _, value in _fields(port) if number == 1), "")
    return Port(name, kind, tuple(shape))


def _inner(message: memoryview, field: int) -> memoryview:
    """A message within a message; empty where there is none."""
    return next((_buffer(value) for number, _, value in _fields(message) if number == field), memoryview(b""))


def _float_arguments(node: memoryview) -> list[str]:
    names = [_text(value) for number, _, value in _fields(node) if number == NODE_INPUT]
    return names[1:] if _kind(node) in FLOAT_ARGUMENTS else []


def _half_tensor(tensor: memoryview, kept: set[str]) -> bytes | memoryview:
    entries = list(_fields(tensor))
    names = [_text(value) for number, _, value in entries if number == TENSOR_NAME]
    types = [value for number, _, value in entries if number == TENSOR_TYPE]
    if types != [FLOAT] or kept.intersection(names):
        return tensor
    parts = []
    values = b""
    for number, wire, value in entries:
        if number in (TENSOR_RAW, TENSOR_FLOATS):
            # float_data is packed, but may come in several pieces; both are little-endian float32.
            values += struct.pack("<f", value) if wire == FIXED32 else bytes(_buffer(value))
        elif number != TENSOR_TYPE:
            parts.append(_encode(number, wire, value))
    if len(values) % 4:
        raise OnnxFileError(f"is no ONNX file: {len(values)} bytes of float32 numbers")
    limit = float(np.finfo(np.float16).max)
    half = np.clip(np.frombuffer(values, "<f4"), -limit, limit).astype("<f2")
    return b"".join([*parts, _whole(TENSOR_TYPE, FLOAT16), _bytes(TENSOR_RAW, half.tobytes())])


def _half_node(node: memoryview, kept: set[str]) -> bytes:
    kind = _kind(node)
    outputs = {_text(value) for number, _, value in _fields(node) if number == NODE_OUTPUT}
    parts = []
    for number, wire, value in _fields(node):
        if number == NODE_ATTRIBUTE and not outputs & kept:
            value = _half_attribute(_buffer(value), kind)
        parts.append(_encode(number, wire, value))
    return b"".join(parts)


def _half_attribute(attribute: memoryview, kind: str) -> bytes:
    entries = list(_fields(attribute))
    name = next((_text(value) for number, _, value in entries if number == ATTRIBUTE_NAME), "")
    parts = []
    for number, wire, value in entries:
        if number == ATTRIBUTE_GRAPH:
            raise OnnxFileError(f"operation {kind} holds a graph of its own")
        if number == ATTRIBUTE_TENSOR:
            value = _half_tensor(_buffer(value), set())
        elif number == ATTRIBUTE_INT and kind == "Cast" and name == "to" and value == FLOAT:
            value = FLOAT16
        parts.append(_encode(number, wire, value))
    return b"".join(parts)


def _half_port(port: memoryview) -> bytes:
    """ValueInfoProto > TypeProto > Tensor > elem_type."""
    return _replace(port, 2, lambda kind: _replace(kind, 1, _half_tensor_type))


def _half_tensor_type(tensor: memoryview) -> bytes:
    return b"".join(
        _encode(number, wire, FLOAT16 if number == 1 and value == FLOAT else value)
        for number, wire, value in _fields(tensor)
    )


def _replace(message: memoryview, field: int, change: Callable[[memoryview], bytes]) -> bytes:
    return b"".join(
        _encode(number, wire, change(_buffer(value)) if number == field else value)
        for number, wire, value in _fields(message)
    )


def _kind(node: memoryview) -> str:
    return next((_text(value) for number, _, value in _fields(node) if number == NODE_TYPE), "")


def _graph(content: bytes | memoryview) -> memoryview:
    for number, _, value in _fields(content):
        if number == MODEL_GRAPH:
            return _buffer(value)
    raise OnnxFileError("holds no graph")


def _with_graph(content: bytes, graph: bytes) -> bytes:
    return b"".join(
        _encode(number, wire, graph if number == MODEL_GRAPH else value) for number, wire, value in _fields(content)
    )


def _attribute(name: str, value: Attribute) -> bytes:
    """AttributeProto, with the type that its readers want beside the value: 2 INT, 3 STRING, 7 INTS."""
    start = _bytes(ATTRIBUTE_NAME, name)
    if isinstance(value, int):
        return start + _whole(ATTRIBUTE_INT, value) + _whole(ATTRIBUTE_TYPE, 2)
    if isinstance(value, str):
        return start + _bytes(ATTRIBUTE_STRING, value) + _whole(ATTRIBUTE_TYPE, 3)
    return start + b"".join(_whole(ATTRIBUTE_INTS, entry) for entry in value) + _whole(ATTRIBUTE_TYPE, 7)


def _fields(message: bytes | memoryview) -> Iterator[Field]:
    """The fields of a protobuf message: number, wire type, value. Raises OnnxFileError."""
    view = memoryview(message)
    place = 0
    while place < len(view):
        try:
            key, place = _read_varint(view, place)
            number, wire = key >> 3, key & 7
            value: Value
            if wire == VARINT:
                value, place = _read_varint(view, place)
            elif wire == BYTES:
                size, place = _read_varint(view, place)
                value, place = view[place : place + size], place + size
                if len(value) != size:
                    raise IndexError
            elif wire == FIXED32:
                value, place = struct.unpack_from("<f", view, place)[0], place + 4
            elif wire == FIXED64:
                value, place = view[place : place + 8], place + 8
                if len(value) != 8:
                    raise IndexError
            else:
                raise IndexError
        except (IndexError, struct.error) as error:
            raise OnnxFileError("is no ONNX file: its bytes end within a field") from error
        yield number, wire, value


def _read_varint(view: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _encode(number: int, wire: int, value: Value) -> bytes:
    if isinstance(value, int):
        return _whole(number, value)
    if isinstance(value, float):
        return _varint(number << 3 | FIXED32) + struct.pack("<f", value)
    if wire == FIXED64:
        return _varint(number << 3 | FIXED64) + bytes(value)
    return _bytes(number, value)


def _whole(number: int, value: int) -> bytes:
    return _varint(number << 3 | VARINT) + _varint(value)


def _bytes(number: int, value: str | bytes | memoryview) -> bytes:
    content = value.encode() if isinstance(value, str) else bytes(value)
    return _varint(number << 3 | BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # a negative number takes ten bytes
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _buffer(value: Value) -> memoryview:
    if isinstance(value, int | float):
        raise OnnxFileError("is no ONNX file: a number where a message was expected")
    return memoryview(value)


def _text(value: Value) -> str:
    try:
        return bytes(_buffer(value)).decode()
    except UnicodeDecodeError as error:
        raise OnnxFileError("is no ONNX file: a name that is no text") from error


def _integer(value: Value) -> int:
    if not isinstance(value, int):
        raise OnnxFileError("is no ONNX file: a message where a number was expected")
    return value
