"""`python -m eval speed` on a tiny backbone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.__main__ import main
from eval.common.options import Model
from eval.speed import harvest
from eval.speed.harvest_report import harvest_table
from smartkv import load_backbone
from smartkv.labels.lifespans import LabelSpec, label_window

PNG = b"\x89PNG"


def run_eval(*args: str | Path) -> None:
    main([str(arg) for arg in args])


def figures(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.usefixtures("measured")
def test_speed_measures_tokens_a_second_and_peak_memory(tmp_path: Path, tiny_backbone: Path) -> None:
    ways = ["smartkv_all_labels", "output_attentions"]
    run_eval("speed", "--backbone", tiny_backbone, "--out", tmp_path, "--lengths", "[64]", "--rounds", "3",
             "--threads", "1", "--ways", json.dumps(ways), "--markdown_file", tmp_path / "page.md")  # fmt: skip
    ours, theirs = rows = figures(tmp_path / "speed.json")["harvest"]
    assert [row["way"] for row in rows] == ways
    for row in rows:
        assert len(row["seconds"]) == 3 and row["peak_memory"] > 2**26
        assert row["tokens_per_second"] == pytest.approx(64 / sorted(row["seconds"])[1])
    faster = sorted(old / new for old, new in zip(theirs["seconds"], ours["seconds"], strict=True))[1]
    line = next(line for line in (tmp_path / "page.md").read_text().splitlines() if ways[0] in line)
    assert [cell.strip() for cell in line.split("|")][3:6:2] == ["3", f"{faster:.2f}"]
    assert (tmp_path / "harvest_speed.png").read_bytes().startswith(PNG)


def test_ways_are_timed_in_turn_and_one_without_room_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(harvest, "_loaded", lambda *_: (None, None))
    monkeypatch.setattr(harvest, "_run", lambda way, *_: float(len(ran.append(way) or ran)))
    assert harvest._seconds(["a", "b"], Model("lm"), 1, 64, 2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert ran == ["a", "b"] * 3

    def isolated(_: Any, ways: list[str], *__: Any) -> dict[str, Any]:
        return {"note": "killed"} if "output_attentions" in ways else {way: [2.0, 4.0, 8.0] for way in ways}

    monkeypatch.setattr(harvest, "run_isolated", isolated)
    found = harvest._timed(["forward", "output_attentions"], Model("lm"), 1, 64, 3)
    assert found["forward"]["tokens_per_second"] == 16 and found["output_attentions"] == {"note": "killed"}
    row = {"way": "output_attentions", "tokens": 64, "peak_memory": 2**30, **found["output_attentions"]}
    table = harvest_table([{"way": "forward", "tokens": 64, "peak_memory": 2**30, **found["forward"]}, row])
    assert [list(column.cells)[1] for column in table.columns][2:] == ["", "", "", "", "1.00", "1.00", "killed"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("ways", '["foo"]', "ways foo"), ("lengths", "[]", "some ways and lengths"), ("lengths", "[1]", "lengths 2"),
     ("lengths", "[64, 99999]", "positions"), ("rounds", "0", "rounds")],
)  # fmt: skip
def test_speed_tells_mistakes_in_a_line(
    name: str, value: str, says: str, tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["speed", "--backbone", str(tiny_backbone), "--out", str(tmp_path), f"--{name}", value])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and says in said and said.count("\n") == 1


def test_both_ways_of_the_speed_command_give_the_same_lifespans(tiny_backbone: Path) -> None:
    lm, tokens = load_backbone(str(tiny_backbone), "float32"), torch.arange(100) % 250
    ours = label_window(lm.model, tokens, LabelSpec((0.05,), (), 10)).lifespan[0]
    lm.model.set_attn_implementation("eager")
    with torch.no_grad():
        old = torch.stack(harvest._output_attentions(lm, tokens))
    assert torch.equal(ours.long(), old)
