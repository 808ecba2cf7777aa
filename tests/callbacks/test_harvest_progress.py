"""The harvest's progress bar."""

from pathlib import Path

import pytest

from tests.lightning_fixtures import harvest


def test_the_harvest_s_progress_bar_counts_tokens(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = [{"class_path": "ShardWriter"}, {"class_path": "HarvestProgress"}]
    trainer = {"callbacks": bar, "enable_progress_bar": True}
    counts = {"train": 2, "validation": 1}
    harvest(tmp_path / "shards", tiny_backbone, tiny_texts, windows=counts, trainer=trainer)
    captured = capsys.readouterr()
    shown = (captured.out + captured.err).replace("\n", "\r").split("\r")
    finished = [line for line in shown if "Harvest" in line and "100%" in line]
    assert finished and "192/192" in finished[-1] and "tokens/s" in finished[-1]
