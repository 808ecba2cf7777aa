"""The header of a GGUF file: its architecture and the size of its weights, without reading the weights.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` decodes all of
the vocabulary too, which takes seconds.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from smartkv.errors import SmartKVError

VERSIONS = (2, 3)
ARCHITECTURE = "general.architecture"
HALF = (1, 30)  # tensor types float16 and bfloat16
STRING, ARRAY = 8, 9  # value types
SIZE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the other value types


@dataclass(frozen=True)
class GgufHeader:
    """What the header of a GGUF file tells.

    Attributes:
        architecture: The model's family, such as `llama`.
        unpacked_bytes: Bytes of the weights in float32; in half precision where the file has them so.
    """

    architecture: str
    unpacked_bytes: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        SmartKVError: The file cannot be read, is no GGUF file, or is damaged.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise SmartKVError(f"'{path}' is not a GGUF file: it does not begin with 'GGUF'")
            version, tensors, values = _numbers(file, "<IQQ")
            if version not in VERSIONS:
                raise SmartKVError(f"'{path}' has GGUF version {version}: expected 2 or 3")
            architecture = ""
            for _ in range(values):
                key, (kind,) = _string(file), _numbers(file, "<I")
                if key == ARCHITECTURE and kind == STRING:
                    architecture = _string(file)
                else:
                    _skip(file, kind)
            return GgufHeader(architecture, sum(_tensor_bytes(file) for _ in range(tensors)))
    except OSError as error:
        raise SmartKVError(f"GGUF file '{path}' cannot be read: {error.strerror or error}") from error
    except (EOFError, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise SmartKVError(f"GGUF file '{path}' is damaged: its header breaks off or makes no sense") from error


def _numbers(file: BinaryIO, layout: str) -> tuple[int, ...]:
    content = file.read(struct.calcsize(layout))
    if len(content) < struct.calcsize(layout):
        raise EOFError
    return struct.unpack(layout, content)


def _string(file: BinaryIO) -> str:
    (length,) = _numbers(file, "<Q")
    content = file.read(length)
    if len(content) < length:
        raise EOFError
    return content.decode("utf-8")


def _skip(file: BinaryIO, kind: int) -> None:
    """Go to the end of a value of a type."""
    if kind == STRING:
        file.seek(_numbers(file, "<Q")[0], 1)
    elif kind == ARRAY:
        inner, count = _numbers(file, "<IQ")
        if inner in SIZE:
            file.seek(SIZE[inner] * count, 1)
        else:
            for _ in range(count):
                _skip(file, inner)
    else:
        file.seek(SIZE[kind], 1)


def _tensor_bytes(file: BinaryIO) -> int:
    """Read an entry of the tensor table; return the tensor's bytes when it is unpacked."""
    _string(file)
    (dimensions,) = _numbers(file, "<I")
    if dimensions > 8:
        raise EOFError
    shape = _numbers(file, f"<{dimensions}Q")
    kind, _ = _numbers(file, "<IQ")
    return math.prod(shape) * (2 if kind in HALF else 4)
