"""The header of a GGUF file is read without the rest, and anything that is none is told in one line."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from smartkv.errors import SmartKVError
from smartkv.models.gguf import packaged_file
from smartkv.models.gguf_header import GgufHeader, read_gguf_header


def write(path: Path, architecture: str = "gemma2", **tensors: np.ndarray) -> Path:
    """A file with every type of value before the tensors."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_uint8("a.uint8", 1)
    writer.add_int16("a.int16", -1)
    writer.add_float32("a.float32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_uint64("a.uint64", 2**40)
    writer.add_float64("a.float64", 0.5)
    writer.add_string("a.string", "text")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_token_list(["one", "zwei", "três"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_architecture_and_the_unpacked_size_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", wide=np.zeros((3, 4), np.float32), half=np.zeros((5, 2), np.float16))
    assert read_gguf_header(path) == GgufHeader("gemma2", 3 * 4 * 4 + 5 * 2 * 2)


def test_the_weights_need_not_be_there(tmp_path: Path) -> None:
    """Only the header is read: a file of which a download has brought no more."""
    path = write(tmp_path / "m.gguf", wide=np.zeros((300, 400), np.float32))
    path.write_bytes(path.read_bytes()[:4096])
    assert read_gguf_header(path).unpacked_bytes == 480_000


def test_the_packaged_model_is_told_as_the_package_gguf_tells_it() -> None:
    assert read_gguf_header(packaged_file()) == GgufHeader("llama", 538_060_032)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"m\.gguf' is not a GGUF file"),
        (b"PK\x03\x04 a zip file", r"m\.gguf' is not a GGUF file"),
        (b"GGUF, but nothing behind it", "has GGUF version"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "has GGUF version 1: expected 2 or 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 5), r"m\.gguf' is damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 5, 2**60) + b"name", r"m\.gguf' is damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 1) + b"k" + struct.pack("<I", 77), r"m\.gguf' is damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 2**31), r"m\.gguf' is damaged"),
    ],
)
def test_what_is_no_gguf_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(SmartKVError, match=message) as refusal:
        read_gguf_header(tmp_path / "m.gguf")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_a_header_that_breaks_off_anywhere_is_named(share: float, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", wide=np.zeros((3, 4), np.float32))
    end = path.read_bytes().index(b"wide") + 40
    path.write_bytes(path.read_bytes()[: int(share * end)])
    with pytest.raises(SmartKVError, match=r"m\.gguf' is damaged: its header breaks off"):
        read_gguf_header(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SmartKVError, match=r"gone\.gguf' cannot be read: No such file"):
        read_gguf_header(tmp_path / "gone.gguf")
