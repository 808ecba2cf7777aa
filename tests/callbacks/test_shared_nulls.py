"""The dashboard's nulls when several processes read the training windows."""

import csv
from pathlib import Path

import pytest

from smartkv.metrics.nulls import score_nulls
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import Manifest
from tests.lightning_fixtures import gates_config, run_cli, write_config


@pytest.mark.parametrize("processes", [2, 4])  # of 3 validation windows, the last of 4 processes has none
def test_nulls_of_several_processes_are_those_of_one(tiny_shards: Path, tmp_path: Path, processes: int) -> None:
    trainer = {"devices": processes, "strategy": "ddp_fork", "max_epochs": 1, "logger": False}
    dashboard = {"class_path": "HeadDashboard"}
    config = gates_config(tiny_shards, tmp_path / "fit", trainer=trainer, callbacks=[dashboard])
    run_cli("fit", "-c", write_config(tmp_path / "fit.yaml", config))
    with (tmp_path / "fit" / "heads.csv").open() as file:
        found = list(csv.DictReader(file))
    for name, sums in score_nulls(LabelledKeys(Manifest.read(tiny_shards))).items():
        assert [float(row[f"R² {name}"]) for row in found] == pytest.approx(sums.r2().tolist(), abs=1e-6)
