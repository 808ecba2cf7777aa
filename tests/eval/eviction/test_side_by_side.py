"""Two comparisons in one table, with the figures that `eval compare` wrote."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from eval.eviction.side_by_side import collect, read_lines, side_by_side_table
from smartkv.errors import SmartKVError
from tests.lightning_fixtures import write_texts
from tests.models import save_random_gates


def compare(out: Path, backbone: Path, gates: Path, texts: Path, windows: int = 2) -> Path:
    sources = [{"name": "mine", "path": str(texts)}]
    settings = {
        "out": out,
        "gates": gates,
        "backbone": backbone,
        "dtype": "float32",
        "contenders": '["all-gated", "window"]',
        "footprints": "[0.6]",
        "texts": json.dumps([{"name": "text", "split": "validation", "sources": sources, "windows": windows}]),
        "recall": json.dumps({"trials": 4, "tokens": 50, "split": "validation"}),
        "haystack": json.dumps(sources),
        "calibration": json.dumps(sources),
        "calibration_windows": 2,
        "window": 64,
        "windows_per_document": 20,
        "score_from": 20,
    }
    main(["compare", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("side_by_side")
    texts = write_texts(root / "texts")
    found = {}
    for seed, label in enumerate(("shipped", "trained")):
        gates = save_random_gates(tiny_backbone, root / f"gates{seed}", seed)
        found[label] = compare(root / label, tiny_backbone, gates, texts)
    return found


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in json.loads((folder / "compare.json").read_text())["rows"]}


def test_each_row_has_the_figures_of_its_comparison(folders: dict[str, Path]) -> None:
    table = side_by_side_table(*collect(folders))
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [row[0] for row in cells] == ["full cache", "shipped", "trained", "StreamingLLM window"]
    window = rows_of(folders["shipped"])["window"]
    expected = {
        "shipped": rows_of(folders["shipped"])["all-gated"],
        "trained": rows_of(folders["trained"])["all-gated"],
    }
    for label, kept, stored, lost, recalled in cells[1:]:
        row = expected.get(label, window)
        text = row["texts"]["text"]
        assert (kept, stored, lost) == (
            f"{text['footprint']:.0%}",
            f"{text['stored']:.0%}",
            f"{text['delta_nll']:+.3f}",
        )
        asked = row["recall"]["asked"]
        assert recalled == (f"{sum(t['right'] for t in row['recall_trials'])} of {asked}" if asked else "–")


def test_comparisons_of_other_texts_have_no_table(
    folders: dict[str, Path], tmp_path: Path, tiny_backbone: Path, random_gates: Path
) -> None:
    texts = write_texts(tmp_path / "texts")
    other = compare(tmp_path / "other", tiny_backbone, random_gates, texts, windows=1)
    with pytest.raises(SmartKVError, match="measured on other texts"):
        collect(folders | {"other": other})


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text('{"rows": [{"kind": "ours"}], "arguments": {}}')
    with pytest.raises(SmartKVError, match="not what `eval compare` writes"):
        read_lines(tmp_path, "gates", reference=True)


def test_the_command_writes_the_lines_that_it_shows(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.dumps({label: str(folder) for label, folder in folders.items()})
    main(["side_by_side", "--out", str(tmp_path), "--results", results])
    lines = json.loads((tmp_path / "side_by_side.json").read_text())["lines"]
    assert [line["label"] for line in lines] == ["full cache", "shipped", "trained", "StreamingLLM window"]
    shown = capsys.readouterr().out
    assert all(f"{line['delta_nll']:+.3f}" in shown for line in lines)


def test_nothing_to_compare_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["side_by_side", "--out", str(tmp_path), "--results", "{}"])
    assert "expected at least one result" in capsys.readouterr().err
