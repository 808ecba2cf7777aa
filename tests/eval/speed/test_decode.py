"""`python -m eval decode` on a tiny backbone: every way is measured, and the figures hang together."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from transformers import Cache

from eval.__main__ import main
from eval.speed.decode import _Bench
from tests.families import save_family
from tests.lightning_fixtures import ROOT, write_texts


def run_decode(folder: Path, backbone: Path, *more: str, config: Path | None = None) -> None:
    sources = json.dumps([{"name": "mine", "path": str(write_texts(folder / "texts"))}])
    shape = ["--contexts", "[64, 128]", "--batches", "[1, 2]", "--steps", "12", "--rounds", "2", "--threads", "1"]
    written = [] if config is None else ["--config", str(config)]
    main(["decode", *written, "--backbone", str(backbone), "--out", str(folder), "--sources", sources, *shape, *more])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    folder = tmp_path_factory.mktemp("decode")
    run_decode(folder, tiny_backbone, "--markdown_file", str(folder / "table.md"))
    return folder


def figures(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "decode.json").read_text())["decode"]


def test_every_way_is_measured_at_every_context_and_batch(measured: Path) -> None:
    assert [(f["context"], f["batch"]) for f in figures(measured)] == [(64, 1), (64, 2), (128, 1), (128, 2)]
    for figure in figures(measured):
        assert set(figure["ms_per_token"]) == {"smartkv", "dynamic", "static", "smartkv_full"}
        assert all(ms > 0 for ms in figure["ms_per_token"].values())
        assert set(figure["prefill"]) == {"smartkv", "dynamic"}


def test_ways_take_few_tokens_a_turn_and_each_takes_all(
    tmp_path: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[Cache, int]] = []
    take = _Bench._steps

    def noted(bench: _Bench, cache: Cache, position: int, steps: int) -> float:
        assert cache.get_seq_length() == position
        turns.append((cache, steps))
        return take(bench, cache, position, steps)

    monkeypatch.setattr(_Bench, "_steps", noted)
    run_decode(tmp_path, tiny_backbone, "--contexts", "[64]", "--batches", "[1]")
    taken = [[steps for cache, steps in turns if cache is way] for way in {cache for cache, _ in turns}]
    assert taken == 4 * [[8, 4, 8, 4]]  # two rounds of 12
    assert all(turns[at][0] is not turns[at + 2][0] for at in range(len(turns) - 2))


def test_every_round_is_kept_beside_their_median(measured: Path) -> None:
    for figure in figures(measured):
        for way, rounds in figure["ms_by_round"].items():
            assert len(rounds) == 2 and figure["ms_per_token"][way] == pytest.approx(statistics.median(rounds))


def test_the_cache_holds_the_footprint_that_was_asked_for(measured: Path) -> None:
    for figure in figures(measured):
        assert figure["footprint"] == pytest.approx(0.25, abs=0.1)
        assert figure["live_bytes"] < figure["bytes"]
        assert figure["live_bytes"] < 0.5 * figure["full_bytes"]


def test_the_machine_and_the_versions_are_named(measured: Path) -> None:
    machine = json.loads((measured / "decode.json").read_text())["arguments"]["machine"]
    assert {"processor", "cores", "torch", "transformers"} <= set(machine)
    table = (measured / "table.md").read_text()
    assert machine["processor"] in table and "| 128 | 2 |" in table
    assert (measured / "decode.png").read_bytes()[:4] == b"\x89PNG"


def test_more_tokens_than_the_model_has_positions_are_refused(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_decode(tmp_path, tiny_backbone, "--contexts", "[500]")
    assert "need 524 positions" in capsys.readouterr().err


def test_a_hybrid_model_whose_states_the_ways_do_not_share_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = save_family(tmp_path / "backbone", "qwen3_next")
    with pytest.raises(SystemExit):
        run_decode(tmp_path / "out", backbone)
    assert "a qwen3_next has layers with linear attention" in capsys.readouterr().err


@pytest.mark.parametrize("what", [("--contexts", "[]"), ("--batches", "[]"), ("--batches", "[0]"), ("--rounds", "0")])
def test_nothing_to_measure_is_told_in_a_line(
    what: tuple[str, str], tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_decode(tmp_path, tiny_backbone, *what)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: contexts, batches") and said.count("\n") == 1


def test_the_config_runs(tmp_path: Path, tiny_backbone: Path, random_gates: Path) -> None:
    table = tmp_path / "table.md"
    own = ("--gates", str(random_gates), "--markdown_file", str(table))
    run_decode(tmp_path, tiny_backbone, *own, config=ROOT / "configs/eval/decode.yaml")
    assert "| 128 | 2 |" in table.read_text() and "untrained" not in table.read_text()
