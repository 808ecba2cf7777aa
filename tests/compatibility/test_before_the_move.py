"""Files that SmartKV 0.1.0 wrote, before its modules moved: they load, and runs go on from them to the same end.

Commit 4f2a3b4 made `before_the_move/` on a tiny random Llama of two layers, with the configs that lie in it: `python
main.py predict -c …/harvest.yaml`, then `fit` with each of the others. Only the folder of the run was taken out of the
checkpoints afterwards.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from smartkv import GateBank, Manifest, load_backbone, load_cache
from tests.lightning_fixtures import ROOT, run_cli, write_config

FILES = Path(__file__).parent / "before_the_move"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs' paths, which checkpoints remember, begin there."""
    monkeypatch.chdir(ROOT)


def go_on(name: str, out: Path) -> None:
    """`fit` with a config of before, from its checkpoint half-way, into another folder."""
    config: dict[str, Any] = yaml.safe_load((FILES / f"{name}.yaml").read_text())
    config["trainer"]["default_root_dir"] = str(out)
    for callback in config["trainer"]["callbacks"]:
        where = "dirpath" if callback["class_path"] == "ModelCheckpoint" else "out"
        callback["init_args"][where] = str(out / callback["class_path"])
    checkpoint = FILES / "checkpoints" / f"{name}.ckpt"
    run_cli("fit", "-c", write_config(out / "run.yaml", config), "--ckpt_path", checkpoint)


def assert_same(found: dict[str, torch.Tensor], expected: Path) -> None:
    then = load_file(expected)
    assert found.keys() == then.keys()
    for name, tensor in then.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_shards_are_read() -> None:
    manifest = Manifest.read(FILES / "shards")
    assert sum(shard.tokens for shard in manifest.shards) == 384


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("name", ["gates", "distilled"])
def test_a_training_of_gates_goes_on_to_the_same_gates(name: str, tmp_path: Path) -> None:
    go_on(name, tmp_path)
    assert_same(load_file(tmp_path / "GateExport" / "model.safetensors"), FILES / name / "model.safetensors")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_eviction_tuning_goes_on_to_the_same_adapter(tmp_path: Path) -> None:
    go_on("eviction_tuning", tmp_path)
    found = load_file(tmp_path / "AdapterExport" / "adapter_model.safetensors")
    assert_same(found, FILES / "adapter.safetensors")


def test_a_saved_cache_goes_on_with_its_gates_to_the_same_logits() -> None:
    lm = load_backbone("tests/compatibility/before_the_move/backbone", "float32")
    cache = load_cache(FILES / "prompt.safetensors", lm.model, GateBank.from_pretrained(FILES / "distilled", lm.model))
    with torch.inference_mode():
        step = [lm.model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0] for token in (5, 6, 7)]
    assert_same({"logits": torch.cat(step)}, FILES / "logits.safetensors")
