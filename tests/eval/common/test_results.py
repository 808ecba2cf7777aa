"""Files that commands write."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.table import Table

from eval.common.results import (
    machine,
    markdown,
    provenance,
    read_result,
    save_picture,
    versions,
    write_result,
    write_tables,
)
from smartkv.errors import SmartKVError


def small_table() -> Table:
    table = Table(title="losses")
    table.add_column("policy")
    table.add_column("loss", justify="right")
    table.add_row("window", "0.5")
    return table


def test_a_result_holds_arguments_versions_and_figures_and_is_read_again(tmp_path: Path) -> None:
    path = write_result(tmp_path / "new", "x", {"seed": 0, "out": tmp_path}, {"figures": [1.5]})
    content = read_result(path)
    assert path == tmp_path / "new/x.json" and content == json.loads(path.read_text())
    assert content["command"] == "x" and content["versions"] == versions() and content["figures"] == [1.5]
    assert content["arguments"] == {"seed": 0, "out": str(tmp_path)}


@pytest.mark.parametrize("content", [None, "{"])
def test_a_result_that_is_missing_or_damaged_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(SmartKVError, match=r"x\.json cannot be read .* run the command that makes it"):
        read_result(tmp_path / "x.json")


def test_a_table_becomes_markdown_with_its_alignment() -> None:
    assert markdown(small_table()).splitlines() == [
        "### losses",
        "",
        "| policy | loss |",
        "| --- | ---: |",
        "| window | 0.5 |",
    ]


def test_tables_stand_after_the_introduction(tmp_path: Path) -> None:
    text = write_tables(tmp_path / "x.md", [small_table(), small_table()], "All measured.").read_text()
    assert text.startswith("All measured.\n\n### losses") and text.count("### losses") == 2


def test_a_picture_is_a_png_in_a_new_folder(tmp_path: Path) -> None:
    path = save_picture(Figure(figsize=(2, 1)), tmp_path / "new" / "x.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_provenance_tells_the_command_the_arguments_and_the_machine() -> None:
    line = provenance("speed", {"rounds": 5, "machine": {"cores": 2}})
    assert line == "`python -m eval speed`: rounds 5. Machine: cores 2."


def test_the_machine_is_described_with_its_versions() -> None:
    description = machine()
    assert description["cores"] >= 1 and description["processor"] and description.items() >= versions().items()
