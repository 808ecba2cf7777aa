"""`python -m eval figures`: the documents' pictures from their figures."""

import json
from pathlib import Path

import pytest

from eval.__main__ import main
from eval.figures_of_docs import ARCHITECTURE, draw
from smartkv.errors import SmartKVError
from tests.lightning_fixtures import ROOT

DATA = sorted((ROOT / "docs/data").glob("*.json"))


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_every_data_file_has_its_picture_and_says_where_its_figures_come_from(path: Path) -> None:
    content = json.loads(path.read_text())
    assert {"figure", "source", "command", "machine", "published"} <= set(content)
    assert (ROOT / content["source"]).is_file()
    assert (ROOT / f"docs/pictures/{path.stem}.png").is_file()


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_every_data_file_can_be_drawn(path: Path) -> None:
    assert draw(path).axes


def test_the_command_draws_what_is_asked_for(tmp_path: Path) -> None:
    main(
        [
            "figures",
            "--data",
            str(ROOT / "docs/data"),
            "--out",
            str(tmp_path),
            "--only",
            f'["{ARCHITECTURE}", "decode"]',
        ]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["architecture.png", "decode.png"]


def test_a_picture_without_data_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["figures", "--data", str(ROOT / "docs/data"), "--out", str(tmp_path), "--only", '["nothing"]'])
    assert capsys.readouterr().err.startswith("error: there is no data for nothing: expected architecture, ")


def test_an_empty_folder_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["figures", "--data", str(tmp_path), "--out", str(tmp_path)])
    assert "holds no JSON files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [({"figure": "pie"}, "'pie': expected one of"), ({"figure": "decode"}, "'rows'")]
)
def test_a_file_that_cannot_be_drawn_says_why(content: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SmartKVError, match=message):
        draw(path)
