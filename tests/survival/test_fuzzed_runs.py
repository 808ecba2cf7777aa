"""Runs whose config has anything in it: they run, or end with status 2 and no traceback.

pytest -m slow tests/survival/test_fuzzed_runs.py
"""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.lightning_fixtures import gates_config, harvest_config, run_cli, write_config
from tests.survival.test_fuzz import changed, places

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(-2, 2),
    st.sampled_from(
        ["", "all", "0-1", "7-9", "nan", "../x", "auto", "keys", [], {}, [1], {"a": 1}, -1, 0, 1e9, float("nan")]
    ),
)


def ends_well(subcommand: str, config: dict[str, Any], path: Path) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            run_cli(subcommand, "-c", write_config(path, config))
        except SystemExit as stop:
            assert stop.code == 2, said.getvalue()
            assert "Traceback" not in said.getvalue() and "rror" in said.getvalue()


def settings_of(config: dict[str, Any], parts: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """The places of all that a user sets in these parts."""
    return [place for place in places(config) if place and place[0] in parts and place[1:2] == ("init_args",)][1:]


@many
@given(data=st.data())
def test_a_fit(data: st.DataObject, tiny_shards: Path, tmp_path: Path) -> None:
    export = {"class_path": "GateExport", "init_args": {"out": str(tmp_path / "export")}}
    config = gates_config(tiny_shards, tmp_path / "root", callbacks=[export])
    config["trainer"]["fast_dev_run"] = True
    place = data.draw(st.sampled_from(settings_of(config, ("model", "data"))))
    ends_well("fit", changed(config, place, data.draw(values)), tmp_path / "fit.yaml")


@many
@given(data=st.data())
def test_a_harvest(data: st.DataObject, tiny_backbone: Path, tiny_texts: Path, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    config = harvest_config(folder / "out", tiny_backbone, tiny_texts, windows={"train": 2, "validation": 1})
    place = data.draw(st.sampled_from([p for p in settings_of(config, ("model", "data")) if "out" not in p]))
    ends_well("predict", changed(config, place, data.draw(values)), folder / "predict.yaml")
