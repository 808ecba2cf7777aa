"""Files of text are read rightly in the encodings that people have, and any other is named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from smartkv.errors import SmartKVError
from smartkv.texts.text_files import read_records, read_text

TEXT = "Wie schön – ein naïve 🦉.\nZweite Zeile.\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_with_or_without_a_byte_order_mark_is_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "a.txt") == TEXT


def test_utf_16_of_the_other_byte_order_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xfe\xff" + TEXT.encode("utf-16-be"))
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_of_other_systems_become_one_character(end: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.replace("\n", end).encode())
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize("name", ["a.txt.gz", "a.TXT.GZ"])
def test_a_compressed_text_is_unpacked(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(TEXT.encode()))
    assert read_text(tmp_path / name) == TEXT


def test_an_empty_file_is_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert read_text(tmp_path / "a.txt") == "" and list(read_records(tmp_path / "a.txt", "text")) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "schön".encode("latin-1"), r"latin\.txt is not in UTF-8 \(byte 3\): convert it"),
        ("cut.txt", TEXT.encode("utf-16")[:-1], r"cut\.txt is not in UTF-16"),
        ("binary.txt", b"\x7fELF\0\0\1", r"binary\.txt is no text: it is binary"),
        ("sixteen.txt", "text".encode("utf-16-le"), r"sixteen\.txt is no text: .* UTF-16 without a byte order mark"),
        ("plain.txt.gz", b"not compressed", r"plain\.txt\.gz is damaged, or no gzip file"),
        ("cut.txt.gz", gzip.compress(TEXT.encode(), mtime=0)[:-9], r"cut\.txt\.gz is damaged"),
    ],
)
def test_what_cannot_be_read_rightly_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SmartKVError, match=message) as refusal:
        read_text(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_a_file_that_may_not_be_read_or_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(SmartKVError, match=r"link\.txt cannot be read: No such file"):
        read_text(tmp_path / "link.txt")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read anything
    with pytest.raises(SmartKVError, match=r"a\.txt cannot be read: Permission denied"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(SmartKVError, match=r"a\.jsonl cannot be read: Permission denied"):
        list(read_records(tmp_path / "a.jsonl", "text"))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("compressed", [False, True])
def test_records_are_read_with_a_mark_and_compressed(mark: bytes, compressed: bool, tmp_path: Path) -> None:
    lines = mark + b"".join(json.dumps({"text": text}).encode() + b"\n\n" for text in (TEXT, "two"))
    path = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    path.write_bytes(gzip.compress(lines) if compressed else lines)
    assert [record["text"] for record in read_records(path, "text")] == [TEXT, "two"]


def test_half_of_a_surrogate_pair_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "whole \\ud83e\\udd89"}\n{"text": "half \\ud83e"}\n')
    records = read_records(path, "text")
    assert next(records) == {"text": "whole 🦉"}
    with pytest.raises(SmartKVError, match=r"a\.jsonl, line 2: 'text' has half of a surrogate pair \(\\ud83e\)"):
        next(records)


def test_records_in_another_encoding_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "x"}\n'.encode("utf-16"))
    with pytest.raises(SmartKVError, match=r"a\.jsonl, line 1: not JSON in UTF-8"):
        list(read_records(tmp_path / "a.jsonl", "text"))
