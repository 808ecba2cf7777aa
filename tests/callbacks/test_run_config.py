"""The config beside a run: it is of a run that began, not of one that was refused."""

from pathlib import Path

import pytest
import yaml

from tests.lightning_fixtures import fit, gates_config, refused, run_cli, write_config


def learning_rate(root: Path) -> float:
    return yaml.safe_load((root / "config.yaml").read_text())["model"]["init_args"]["learning_rate"]


def test_a_fit_that_is_refused_or_a_validation_leaves_the_config_of_the_run(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    fit(tiny_shards, root, model={"learning_rate": 0.02}, trainer={"max_epochs": 1, "logger": False})
    assert learning_rate(root) == 0.02
    other = {"model": {"learning_rate": 0.05}, "trainer": {"logger": False}}
    run_cli("validate", "-c", write_config(tmp_path / "other.yaml", gates_config(tiny_shards, root, **other)))
    small = gates_config(tiny_shards, root, data={"layers": "7"}, **other)
    refused(capsys, "fit", "-c", write_config(tmp_path / "small.yaml", small))
    assert learning_rate(root) == 0.02
