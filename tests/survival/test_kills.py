"""SIGKILL at random moments: each run goes on, and ends with what an uninterrupted one ends with.

pytest -m slow tests/survival/test_kills.py -s    # prints the log of kills
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eval.__main__ import main as evaluate
from smartkv.io.atomic import PART
from smartkv.shards.manifest import MANIFEST
from tests.datamodules.test_online_keys import online_config
from tests.lightning_fixtures import gates_config, harvest_config_at, shard_bytes, write_config, write_texts
from tests.lightning_modules.test_eviction_tuning import config as tuning_config
from tests.models import save_random_gates
from tests.survival.killing import Log, cli, killed_until_done, seconds

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROUNDS, KILLS = 2, 4  # of each kind of run: five kinds make 40 kills, less those that came after the end


@pytest.fixture(scope="module")
def told() -> Iterator[list[str]]:
    """Lines of the log, printed at the end."""
    lines: list[str] = []
    yield lines
    print("\n" + "\n".join(lines))
    kills = sum(int(line.split(": ")[1].split()[0]) for line in lines)
    assert len(lines) < 5 or kills >= 20, f"all five kinds of run were killed {kills} times only"


def rounds(name: str, make: Any, same: Any, told: list[str], root: Path) -> None:
    """`make(name)` gives the run that works in that folder of `root`; `same(name, whole)` compares two of them."""
    log, random_ = Log(), random.Random(name)
    whole = make("whole")
    taken = seconds(whole)
    for number in range(ROUNDS):
        killed_until_done(make(f"killed{number}"), taken, KILLS, random_, log)
        same(f"killed{number}", "whole")
        assert not list((root / f"killed{number}").rglob(f".*{PART}")), "half a file was left"
    told.append(log.line(name))
    assert len(log.kills) >= 3, "the runs ended before they were killed: this tells nothing"


def equal_weights(first: Path, second: Path) -> None:
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


def test_a_harvest(tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, told: list[str]) -> None:
    many: dict[str, Any] = {"windows": {"train": 57, "validation": 3}, "data": {"windows_per_shard": 1}}

    def make(name: str) -> Any:
        return cli("predict", "-c", harvest_config_at(tmp_path / name, tiny_backbone, tiny_texts, **many))

    def same(killed: str, whole: str) -> None:
        assert shard_bytes(tmp_path / killed) == shard_bytes(tmp_path / whole)
        assert (tmp_path / killed / MANIFEST).read_bytes() == (tmp_path / whole / MANIFEST).read_bytes()

    rounds("harvest", make, same, told, tmp_path)


def saving(root: Path, every: int = 1) -> dict[str, Any]:
    """A last checkpoint every so many steps, also in the middle of an epoch."""
    last = {"dirpath": str(root / "checkpoints"), "every_n_train_steps": every, "save_last": True, "save_top_k": 1}
    return {"class_path": "ModelCheckpoint", "init_args": last | {"enable_version_counter": False}}


def exporting(root: Path) -> dict[str, Any]:
    return {
        "class_path": "GateExport",
        "init_args": {"out": str(root / "export"), "monitor": "val_loss", "mode": "min"},
    }


@pytest.mark.parametrize("kind", ["shards", "online"])
def test_a_fit(
    kind: str, tmp_path: Path, tiny_shards: Path, tiny_backbone: Path, tiny_texts: Path, told: list[str]
) -> None:
    def make(name: str) -> Any:
        root = tmp_path / name
        callbacks = [saving(root), exporting(root)]
        if kind == "shards":
            config = gates_config(tiny_shards, root, trainer={"max_epochs": 12}, callbacks=callbacks)
        else:
            config = online_config(tiny_backbone, tiny_texts, root, fit={"callbacks": callbacks}, passes=12)
        config["trainer"]["enable_checkpointing"] = True
        return cli("fit", "-c", write_config(tmp_path / f"{name}.yaml", config), "--ckpt_path", "last")

    def same(killed: str, whole: str) -> None:
        last = [tmp_path / name / "checkpoints/last.ckpt" for name in (killed, whole)]
        ours, theirs = (torch.load(path, weights_only=True) for path in last)
        assert ours["global_step"] == theirs["global_step"]
        for name, tensor in theirs["state_dict"].items():
            torch.testing.assert_close(ours["state_dict"][name], tensor, rtol=0, atol=1e-6)
        equal_weights(tmp_path / killed / "export/model.safetensors", tmp_path / whole / "export/model.safetensors")

    rounds(f"fit ({kind})", make, same, told, tmp_path)


def test_eviction_tuning(tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, told: list[str]) -> None:
    def make(name: str) -> Any:
        root = tmp_path / name
        config = tuning_config(root, tiny_backbone, tiny_texts, trainer={"max_epochs": 6})
        config["trainer"]["callbacks"][0] = saving(root)
        return cli("fit", "-c", write_config(tmp_path / f"{name}.yaml", config), "--ckpt_path", "last")

    def same(killed: str, whole: str) -> None:
        equal_weights(*(tmp_path / name / "final/adapter_model.safetensors" for name in (killed, whole)))

    rounds("eviction tuning", make, same, told, tmp_path)


def test_a_comparison(tmp_path: Path, tiny_backbone: Path, told: list[str]) -> None:
    random_gates = save_random_gates(tiny_backbone, tmp_path / "gates")
    texts = write_texts(tmp_path / "texts", splits=["train", "test"])
    mine = json.dumps([{"name": "mine", "path": str(texts)}])

    def make(name: str) -> Any:
        settings = {
            "out": tmp_path / name,
            "backbone": tiny_backbone,
            "gates": random_gates,
            "dtype": "float32",
            "texts": json.dumps([{"name": "books", "sources": json.loads(mine), "windows": 6}]),
            "recall": json.dumps({"trials": 4, "tokens": 50}),
            "haystack": mine,
            "calibration": mine,
            "calibration_windows": 2,
            "window": 64,
            "windows_per_document": 20,
            "score_from": 20,
            "contenders": '["all-gated", "window", "h2o", "keydiff", "null:token_table", "oracle:attention"]',
            "footprints": "[0.8, 0.5]",
        }
        options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        return lambda: evaluate(["compare", *options])

    def same(killed: str, whole: str) -> None:
        ours, theirs = (json.loads((tmp_path / name / "compare.json").read_text()) for name in (killed, whole))
        assert ours["rows"] == theirs["rows"] and ours["full"] == theirs["full"]

    rounds("compare", make, same, told, tmp_path)
