"""Gates trained while the LM reads: the rows of shards without shards, the same on any number of processes."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.block_loader import KeyBatch
from datamodules.lifespan_shards import LifespanShards
from datamodules.online_keys import OnlineKeys
from smartkv.errors import SmartKVError
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import WindowCounts
from tests.lightning_fixtures import (
    FOLLOW_UP,
    SINKS,
    WATCHER,
    WINDOW,
    Watcher,
    error_line,
    fit_by_trainer,
    gates_config,
    last_logged,
    refused,
    run_cli,
    weights,
    write_config,
)

SETTINGS = {
    "window": WINDOW,
    "windows": {"train": 7, "validation": 3, "test": 0},
    "ages": (8,),
    "follow_up": FOLLOW_UP,
    "sinks": SINKS,
    "dtype": "float32",
    "buffer": 3,
    "passes": 2,
    "batch_size": 24,
    "block": 8,
    "threads": 1,
}


def online(backbone: Path, texts: Path, **changes: Any) -> OnlineKeys:
    settings = SETTINGS | {"windows": WindowCounts(**SETTINGS["windows"])} | changes
    data = OnlineKeys([SourceConfig("mine", path=str(texts))], backbone=str(backbone), **settings)
    data.trainer = None
    data.setup("fit")
    return data


def online_config(backbone: Path, texts: Path, root: Path, **changes: Any) -> dict[str, Any]:
    config = gates_config(Path("none"), root, trainer={"max_epochs": 1}, **changes.pop("fit", {}))
    sources = [{"name": "mine", "path": str(texts)}]
    settings = SETTINGS | {"ages": [8], "backbone": str(backbone), "sources": sources} | changes
    config["data"] = {"class_path": "OnlineKeys", "init_args": settings}
    return config


def rows_of(batch: KeyBatch) -> list[bytes]:
    """Each row: its keys, labels, place and token."""
    parts = [batch.keys, batch.labels.log4_lifespan[..., None], batch.labels.future_attention[0][..., None]]
    joined = torch.cat([part.float() for part in parts], dim=2).nan_to_num(-1.0)
    place = torch.stack([batch.position, batch.token], dim=1)
    return [joined[:, row].numpy().tobytes() + place[row].numpy().tobytes() for row in range(batch.position.shape[0])]


def test_each_row_of_the_shards_comes_as_often_as_asked_and_no_other(
    tiny_shards: Path, tiny_backbone: Path, tiny_texts: Path
) -> None:
    shards = LifespanShards(str(tiny_shards), batch_size=24, block=8)
    shards.trainer = None
    shards.setup("fit")
    data = online(tiny_backbone, tiny_texts)
    for name, passes in (("train_dataloader", 2), ("val_dataloader", 1)):
        expected = Counter(row for batch in getattr(shards, name)() for row in rows_of(batch))
        found = Counter(row for batch in getattr(data, name)() for row in rows_of(batch))
        assert found == Counter({row: passes * count for row, count in expected.items()})


def test_no_more_keys_are_held_than_the_buffer_has_room_for(tiny_backbone: Path, tiny_texts: Path) -> None:
    data = online(tiny_backbone, tiny_texts)
    validation = len(data.in_memory)
    blocks = len(data.blocks[0])
    most = max(len(data.in_memory) - validation for _ in data.train_dataloader())
    assert 2 * blocks < most <= data.buffer * blocks and len(data.in_memory) == validation


def test_an_epoch_after_one_that_was_cut_short_gives_its_batches_all_the_same(
    tiny_backbone: Path, tiny_texts: Path
) -> None:
    whole, cut = online(tiny_backbone, tiny_texts), online(tiny_backbone, tiny_texts)
    blocks, validation = len(cut.blocks[0]), len(cut.in_memory)
    for data, taken in ((whole, None), (cut, 5)):
        loader = data.train_dataloader()
        loader.load_state_dict({"epoch": 0, "consumed": 0})
        list(islice(loader, taken))
        loader.set_epoch(1)
        assert len(data.in_memory) >= validation + (blocks if taken else 0)  # something is left, or this tells nothing
        data.second = []
        for batch in loader:
            data.second.append(rows_of(batch))
            assert len(data.in_memory) - validation <= data.buffer * blocks
    assert cut.second == whole.second


def test_a_loader_that_is_taken_up_gives_the_rest_of_the_same_batches(tiny_backbone: Path, tiny_texts: Path) -> None:
    data = online(tiny_backbone, tiny_texts)
    whole = [rows_of(batch) for batch in data.train_dataloader()]
    for stop in (1, 7, len(whole) - 1):
        later = online(tiny_backbone, tiny_texts).train_dataloader()
        later.load_state_dict({"epoch": 0, "consumed": stop})
        assert [rows_of(batch) for batch in later] == whole[stop:]


def test_gates_learn_what_shards_teach(
    tiny_shards: Path, tiny_backbone: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    """With a buffer of three windows of seven only the order differs: figures a little apart, not another training."""
    fit_by_trainer(tiny_shards, tmp_path / "shards", trainer={"max_epochs": 16})
    config = online_config(tiny_backbone, tiny_texts, tmp_path / "online", buffer=3, passes=4)
    config["trainer"]["max_epochs"] = 4
    run_cli("fit", "-c", write_config(tmp_path / "online.yaml", config))
    ours, theirs = last_logged(tmp_path / "online"), last_logged(tmp_path / "shards")
    assert theirs["val_r2_mean"] > 0.08  # something is learnt
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=0.02)
    assert ours["val_r2_mean"] == pytest.approx(theirs["val_r2_mean"], abs=0.02)


@pytest.fixture(scope="module")
def once(tiny_backbone: Path, tiny_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watcher]:
    """An uninterrupted fit, with a checkpoint every second step."""
    root = tmp_path_factory.mktemp("online")
    often = {"dirpath": str(root / "checkpoints"), "every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}
    callbacks = [{"class_path": "ModelCheckpoint", "init_args": often}, WATCHER]
    config = online_config(tiny_backbone, tiny_texts, root, fit={"callbacks": callbacks})
    run_cli("fit", "-c", write_config(root / "config.yaml", config))
    return root, Watcher.last


def test_two_processes_reach_the_figures_of_one(
    once: Any, tiny_backbone: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    config = online_config(tiny_backbone, tiny_texts, tmp_path / "two")
    config["trainer"] |= {"devices": 2, "strategy": "ddp_fork"}
    run_cli("fit", "-c", write_config(tmp_path / "two.yaml", config))
    ours, theirs = last_logged(tmp_path / "two"), last_logged(once[0])
    assert ours["val_r2_mean"] == pytest.approx(theirs["val_r2_mean"], abs=1e-3)
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-5)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_fit_ends_with_the_weights_of_the_uninterrupted_one(
    once: Any, tiny_backbone: Path, tiny_texts: Path, tmp_path: Path
) -> None:
    root, watcher = once
    config = online_config(tiny_backbone, tiny_texts, tmp_path / "again", fit={"callbacks": [WATCHER]})
    path = write_config(tmp_path / "again.yaml", config)
    run_cli("fit", "-c", path, "--ckpt_path", root / "checkpoints" / "step=8.ckpt")
    for name, tensor in weights(watcher.module).items():
        torch.testing.assert_close(weights(Watcher.last.module)[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"buffer": 0}, "buffer, passes and threads must be at least 1"),
        ({"windows": {"train": 7, "validation": 0, "test": 0}}, "validation must be at least 1"),
        ({"follow_up": 60}, "follow_up 60 leaves no key"),
        ({"window": 5000}, "window of 5000 tokens is longer"),
        ({"layers": "0-9"}, "layers '0-9' asks for"),
        ({"threshold": 1.5}, "thresholds must be attention probabilities"),
    ],
)
def test_mistakes_are_told_in_a_line(
    wrong: dict[str, Any],
    said: str,
    tiny_backbone: Path,
    tiny_texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = online_config(tiny_backbone, tiny_texts, tmp_path / "wrong", **wrong)
    assert said in error_line(refused(capsys, "fit", "-c", write_config(tmp_path / "wrong.yaml", config)))


def test_what_is_no_longer_held_is_told(tiny_backbone: Path, tiny_texts: Path) -> None:
    data = online(tiny_backbone, tiny_texts)
    with pytest.raises(SmartKVError, match="has no 'keys' in memory"):
        data.rows.keys(data.blocks[0][0])
