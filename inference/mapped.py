"""A network's large weights read from its file where they lie, so that their memory can be given back.

OpenVINO packs weights for the processor and keeps those that it was given beside them: 117 MiB of the full-size network.
Laid over pages of the file, they take no memory once they are packed, and are there again if somebody reads them.
"""

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from inference.onnx_file import raw_tensors

LARGE = 1 << 20  # bytes


class MappedWeights:
    """The pages of an ONNX file. Raises OSError where it cannot be mapped."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # OpenVINO wants arrays that could be written to; nobody does, and a page that is not written to stays the file's.
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def lay_under(self, model: Any) -> int:
        """Put the file's bytes in place of equal large constants of an OpenVINO model; how many there were.

        Equal to the last bit: whoever checked the model need not check the file. Raises OnnxFileError.
        """
        from openvino.op import Constant

        raw = raw_tensors(memoryview(self._pages))
        replaced = 0
        for node in model.get_ops():
            if node.get_type_name() != "Constant" or node.get_byte_size() < LARGE:
                continue
            values, found = node.data, raw.get(node.get_friendly_name(), b"")
            if len(found) != values.nbytes:
                continue
            here = np.frombuffer(found, values.dtype).reshape(values.shape)
            if np.array_equal(here, values):
                node.output(0).replace(Constant(here, shared_memory=True).output(0))
                replaced += 1
        return replaced

    def give_back(self) -> None:
        """Let go of the pages' memory."""
        self._pages.madvise(mmap.MADV_DONTNEED)
