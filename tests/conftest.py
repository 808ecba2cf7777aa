"""No network, one thread, and what several tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import save_tiny_backbone

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ranges", action="store_true", help="caches decode from ranges, as on a GPU, and not from pages")


def pytest_collection_finish() -> None:
    """Take what the imports left out of garbage collection: walking it at each collection takes a third of some tests.

    It lives as long as the tests do.
    """
    gc.collect()
    gc.freeze()


FRESH = """
import importlib, importlib.util, json, pkgutil, sys
import smartkv
names = sorted(module.name for module in pkgutil.walk_packages(smartkv.__path__, "smartkv."))
if importlib.util.find_spec("kvpress") is None:
    names.remove("smartkv.press")  # an extra
if importlib.util.find_spec("triton") is None:
    names = [name for name in names if not name.startswith("smartkv.kernels.")]  # an extra
for name in names:
    importlib.import_module(name)
roots = sorted({name.partition(".")[0] for name in sys.modules})

from pathlib import Path
from smartkv.shards.shard_file import write_shard
from tests.models import shard_tensors
write_shard(Path(sys.argv[1]), shard_tensors(ages=1, post_rope=True), {"b": 1, "a": [2, "é"], "c": {"y": 0, "x": None}})
print(json.dumps({"imported": names, "roots": roots}))
"""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Whatever an earlier test left: a forked process that computes with more than one hangs, if its parent did so."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def ranges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.config.getoption("--ranges"):
        monkeypatch.setattr("smartkv.cache.ranges.ranges_serve", lambda device: True)
        monkeypatch.setattr("smartkv.cache.ragged_chunk_attention.QUERIES_ON_GPU", 16)


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `load_backbone` takes: a tiny Llama of 512 positions with a byte-level tokenizer."""
    return save_tiny_backbone(tmp_path_factory.mktemp("backbone"), max_positions=512)


@pytest.fixture(scope="session")
def fresh_interpreter(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a new Python process sees: `imported` modules of smartkv, the `roots` in `sys.modules` after that, and the
    bytes of a `shard` it wrote. One process for all who ask: it starts for seconds."""
    path = tmp_path_factory.mktemp("fresh") / "shard.safetensors"
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"shard": path.read_bytes()}


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made texts with a train and a validation split."""
    from tests.lightning_fixtures import write_texts

    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, tiny_texts: Path) -> Path:
    """A real harvest of the tiny model: 7 training and 3 validation windows of 64 tokens."""
    from tests.lightning_fixtures import harvest

    return harvest(tmp_path_factory.mktemp("harvest") / "shards", tiny_backbone, tiny_texts)
