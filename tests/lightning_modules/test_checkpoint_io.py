"""Checkpoint files: replaced whole or not at all, and read without running code."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from smartkv.errors import SmartKVError
from smartkv.io.atomic import PART
from tests.harm import full_disk


class Dies:
    """Cannot be saved, as if the run had been stopped in the middle."""

    def __reduce__(self) -> Any:
        raise KeyboardInterrupt


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    files, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    whole = {"state_dict": {"weight": torch.ones(1000)}, "pytorch-lightning_version": "2"}
    files.save_checkpoint(whole, path)
    (tmp_path / f".last.ckpt.k3jd82hs{PART}").write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint({"state_dict": {"weight": torch.zeros(1000)}, "end": Dies()}, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["weight"], torch.ones(1000))
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(tmp_path: Path) -> None:
    files, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    files.save_checkpoint({"state_dict": {}, "pytorch-lightning_version": "2"}, path)
    with full_disk(20_000), pytest.raises(SmartKVError, match="could not be written: File too large"):
        files.save_checkpoint({"state_dict": {"weight": torch.zeros(100_000)}}, path)
    assert read_checkpoint(path)["state_dict"] == {} and len(list(tmp_path.iterdir())) == 1


def test_weights_without_a_training_are_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(SmartKVError, match=r"no checkpoint of a training: it lacks state_dict"):
        read_checkpoint(tmp_path / "weights.pt")


class RunsCode:
    """Unpickling an instance would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": RunsCode(tmp_path / "ran")}, tmp_path / "some.ckpt")
    for read in (read_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(SmartKVError, match="it could run code"):
            read(tmp_path / "some.ckpt")
    assert not (tmp_path / "ran").exists()


def test_the_plugin_reads_weights_alone_which_are_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "weights.pt")["weight"].tolist() == [1.0, 1.0]
