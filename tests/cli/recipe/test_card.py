"""The result's card: figures, licence, and the command that made the gates."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from cli.recipe.card import check_licence, figures, licence_of, made_by, publish, window_loss
from cli.recipe.configs import Layout
from cli.recipe.settings import Options
from smartkv import GateBank
from smartkv.errors import SmartKVError
from smartkv.models.architecture import Fingerprint
from smartkv.texts.sources import SourceConfig
from tests.cli.fixtures import layout_of


def reading(footprint: float, delta: float) -> dict[str, Any]:
    return {"footprint": footprint, "delta_nll": delta, "interval": [delta, delta], "delta_nll_window": [delta] * 3}


def row(contender: str, target: float, kept: float, delta: float, right: float | None) -> dict[str, Any]:
    recall = {"asked": 0 if right is None else 8, "right": right, "footprint": kept}
    return {"contender": contender, "target": target, "texts": {"code": reading(kept, delta)}, "recall": recall}


def result(right: float | None = 0.75, split: str = "test") -> dict[str, Any]:
    rows = [row("gates", 0.125, 0.15, 0.2, right), row("gates", 0.5, 0.5, 0.01, right)]
    rows += [row("window", 0.125, 0.125, 0.8, 0.25), row("window", 0.25, 0.25, 0.4, 0.5)]
    machine = {"processor": "P"}
    return {
        "rows": rows,
        "full": {"texts": {"code": {}}},
        "arguments": {"window": 2048, "texts": {"code": {"split": split}}},
        "machine": machine,
    }


def test_the_card_has_the_footprints_of_an_eighth_and_a_quarter() -> None:
    (text,) = figures(result())["texts"]
    assert (text["text"], text["target"], text["footprint"], text["windows"]) == ("code", 0.125, 0.15, 3)
    assert 0.4 < text["window_delta_nll"] < 0.8  # between the window's points
    assert figures(result())["recall"] == [
        {"target": 0.125, "footprint": 0.15, "right": 0.75, "asked": 8, "window_right": 0.25}
    ]


def test_the_split_of_each_kind_of_text_is_remembered() -> None:
    (text,) = figures(result(split="validation"))["texts"]
    assert text["split"] == "validation"


def test_facts_that_the_model_itself_does_not_recall_are_no_figure() -> None:
    none = result(right=None)
    none["full"]["recall"] = {"asked": 8, "right": 0.0}
    assert figures(none)["recall"] == [] and figures(none)["facts"] == {"asked": 8, "recalled": 0}


def test_how_many_facts_the_model_recalls_is_remembered() -> None:
    some = result()
    some["full"]["recall"] = {"asked": 12, "right": 8 / 12}
    assert figures(some)["facts"] == {"asked": 12, "recalled": 8}
    assert figures(result())["facts"] == {"asked": 0, "recalled": 0}  # none were asked for


def test_the_windows_loss_is_read_between_its_points_and_hardly_beyond() -> None:
    curve = [(0.1, 0.8), (0.4, 0.2)]
    assert window_loss(0.2, curve) == pytest.approx(0.5)  # half of the way in the log
    assert window_loss(0.1, curve) == pytest.approx(0.8) and window_loss(0.095, curve) == pytest.approx(0.8)
    assert window_loss(0.05, curve) is None and window_loss(0.9, curve) is None and window_loss(0.2, []) is None
    assert window_loss(0.2, [(0.1, 0.2), (0.4, -0.2)]) == pytest.approx(
        0.0
    )  # a window may be better than the full cache


@pytest.mark.parametrize(
    ("options", "command"),
    [
        (Options("m"), "make gates MODEL=m OUT=o"),
        (Options("a b", size="small"), "make gates 'MODEL=a b' OUT=o SIZE=small"),
        (Options("m", seed=3), "python -m cli.make_gates --backbone m --out o --seed 3"),
    ],
)
def test_the_command_that_made_the_gates(options: Options, command: str) -> None:
    assert made_by(Layout(Path("o")), options) == command


def test_a_licence_that_was_given_stands_in_the_command() -> None:
    command = made_by(Layout(Path("o")), Options("m"), "mit")
    assert command == "python -m cli.make_gates --backbone m --out o --licence mit"


def test_own_texts_stand_in_the_command() -> None:
    command = made_by(Layout(Path("o")), Options("m", sources=[SourceConfig("mine", path="/texts")]))
    assert "--sources '[{" in command and '"path": "/texts"' in command


# -- licence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_models_with_a_name_have_their_licence(backbone: str) -> None:
    assert licence_of(backbone) == "apache-2.0"


@pytest.mark.parametrize(
    ("readme", "licence"),
    [("---\nlicense: mit\n---\n# x", "mit"), ("# x", None), ("---\nlicense: [a, b]\n---\n", None), (None, None)],
)
def test_a_folders_licence_is_that_of_its_card(readme: str | None, licence: str | None, tmp_path: Path) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert licence_of(str(tmp_path)) == licence


def test_without_the_hub_no_licence_is_claimed() -> None:
    assert licence_of("owner/name") is None


def test_an_empty_licence_is_refused() -> None:
    check_licence("mit")
    check_licence(None)
    with pytest.raises(SmartKVError, match="--licence is empty"):
        check_licence("")


@pytest.mark.parametrize(("licence", "line"), [("MIT", "license: mit\n"), ("My own terms", None), (None, None)])
def test_the_gates_get_the_licence_that_is_known(licence: str | None, line: str | None, tmp_path: Path) -> None:
    layout = layout_of(tmp_path)
    GateBank(Fingerprint("llama", 2, 2, 4, "0")).save_pretrained(tmp_path / "distilled" / "export")
    publish(layout, Options(str(tmp_path)), licence)
    card = (layout.gates / "README.md").read_text()
    assert ("license:" in card) == (line is not None) and (line or "") in card
    assert "make gates MODEL=" in card if licence is None else f"--licence {shlex.quote(licence)}" in card
    assert (licence or "names none that could be read") in card
