"""The config of each step: complete, annotated, accepted by the command that it names."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.recipe.configs import TEMPLATES, Layout, steps_of, values, write_configs
from cli.recipe.look import Kind
from cli.recipe.settings import SIZES, Options
from smartkv.errors import SmartKVError
from tests.cli.fixtures import a_look, layout_of
from tests.lightning_fixtures import run_cli
from tests.test_config_comments import unexplained

OPTIONS = Options("Qwen/Qwen2.5-0.5B", seed=7)
STEPS = ("harvest", "lifespans", "distilled", "report")


def read(layout: Layout, step: str) -> dict[str, Any]:
    return yaml.safe_load(layout.config(step).read_text())


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = layout_of(tmp_path / "a folder")
    write_configs(layout, OPTIONS, a_look())
    return layout


@pytest.mark.parametrize("step", STEPS)
def test_every_key_of_the_template_is_there_with_its_comment(step: str, layout: Layout) -> None:
    text = layout.config(step).read_text()
    template = yaml.safe_load((TEMPLATES / f"{step}.yaml").read_text())
    assert unexplained(text) == []
    written = yaml.safe_load(text)
    assert written.keys() == template.keys()
    for part in ("trainer", "model", "data"):
        assert set(written.get(part, {})) == set(template.get(part, {}))


@pytest.mark.parametrize("step", ["harvest", "lifespans", "distilled"])
def test_main_accepts_the_config_as_it_is(step: str, layout: Layout) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        run_cli(*layout.command(step)[1:], "--print_config")
    assert stop.value.code == 0
    assert yaml.safe_load(printed.getvalue())["out"] == str(layout.out / {"harvest": "shards"}.get(step, step))


def test_each_step_reads_what_the_one_before_it_leaves(layout: Layout) -> None:
    assert read(layout, "lifespans")["data"]["init_args"]["shards"] == read(layout, "harvest")["out"]
    assert read(layout, "distilled")["model"]["init_args"]["gates"] == f"{read(layout, 'lifespans')['out']}/export"
    assert read(layout, "report")["gates"] == str(layout.gates)


def test_the_model_its_texts_and_the_size_are_in_the_configs(layout: Layout) -> None:
    amounts, harvest, distilled = SIZES["standard"], read(layout, "harvest"), read(layout, "distilled")
    for config in (harvest, distilled):
        assert config["model"]["init_args"]["backbone"] == config["data"]["init_args"]["backbone"] == OPTIONS.backbone
        assert [source["name"] for source in config["data"]["init_args"]["sources"]] == ["pg19", "recall"]
    assert harvest["data"]["init_args"]["windows"] == {
        "train": amounts.harvest[0],
        "validation": amounts.harvest[1],
        "test": 0,
    }
    assert distilled["data"]["init_args"]["window"] == amounts.short_window
    assert (harvest["data"]["init_args"]["seed"], distilled["data"]["init_args"]["seed"]) == (7, 8)


def test_a_short_model_has_short_windows(tmp_path: Path) -> None:
    layout, look = layout_of(tmp_path), a_look(max_positions=600)
    write_configs(layout, OPTIONS, look)
    harvest, report = read(layout, "harvest"), read(layout, "report")
    assert (harvest["data"]["init_args"]["window"], harvest["model"]["init_args"]["follow_up"]) == (600, 300)
    assert report["measure"]["window"] == 600 > report["recall"]["tokens"] and report["measure"]["score_from"] == 150


def kind(name: str, source: str, split: str = "test") -> Kind:
    return Kind(name, split, [{"name": source, "weight": 1.0, "origins": ["local"]}])


@pytest.mark.parametrize(
    ("kinds", "asked", "around"),
    [
        ([kind("books", "pg19"), kind("maths", "gsm8k"), kind("code", "code")], ["books", "code"], "pg19"),
        ([kind("chat", "chat"), kind("manual", "builtin")], ["books", "chat"], "builtin"),
        ([kind("mine", "mine")], ["books"], "mine"),
        ([kind("books", "pg19"), kind("code", "code", "validation")], ["books"], "pg19"),
        ([kind("code", "code")], ["code"], "code"),
    ],
)
def test_facts_are_asked_for_in_books_code_and_chats_that_can_be_had(
    kinds: list[Kind], asked: list[str], around: str, tmp_path: Path
) -> None:
    layout = layout_of(tmp_path)
    write_configs(layout, OPTIONS, a_look(kinds=kinds))
    recall = read(layout, "report")["recall"]
    assert recall["kinds"] == asked and recall["split"] == "test" and recall["forms"] == "foreign"
    assert recall["haystack"][0]["name"] == around
    for name in ("code", "chat"):
        assert name not in asked or recall[f"{name}_haystack"][0]["name"] == name


def test_on_a_gpu_all_steps_compute_there(tmp_path: Path) -> None:
    layout = layout_of(tmp_path)
    write_configs(layout, OPTIONS, a_look(device="cuda"))
    assert [read(layout, step)["trainer"]["accelerator"] for step in STEPS[:3]] == ["gpu"] * 3
    assert read(layout, "report")["model"]["device"] == "cuda"


def test_a_changed_config_is_refused_and_a_new_comment_is_not(layout: Layout) -> None:
    path = layout.config("lifespans")
    path.write_text("# mine\n" + path.read_text())
    write_configs(layout, OPTIONS, a_look())
    assert path.read_text().startswith("# mine\n")
    path.write_text(path.read_text().replace("hidden: 64", "hidden: 32"))
    with pytest.raises(SmartKVError, match=r"lifespans\.yaml holds other values .* run the step by hand with 'python"):
        write_configs(layout, OPTIONS, a_look())


def test_a_damaged_config_is_refused(layout: Layout) -> None:
    layout.config("report").write_text("a: [")
    with pytest.raises(SmartKVError, match=r"report\.yaml cannot be read .*: delete it"):
        write_configs(layout, OPTIONS, a_look())


def test_without_a_text_to_measure_there_is_no_report() -> None:
    assert steps_of(a_look()) == list(STEPS) and steps_of(a_look(kinds=[])) == list(STEPS[:3])


@pytest.mark.parametrize("step", STEPS)
def test_every_value_has_its_place_in_the_template(step: str, tmp_path: Path) -> None:
    given = values(step, Layout(tmp_path), OPTIONS, a_look())
    assert given["out"].startswith(str(tmp_path)) and len(given) > 4


def test_clearing_deletes_what_the_steps_made_and_nothing_else(tmp_path: Path) -> None:
    made = ["shards/train-00000.safetensors", "shards/manifest.json", "lifespans/checkpoints/last-v1.ckpt",
            "distilled/export/model.safetensors", "report/frontier_books.png", "gates/README.md",
            "report/.lock"]  # fmt: skip
    own = ["report/mine.txt", "gates/mine/config.json", "notes.txt", "recipe.json"]
    for name in [*made, *own]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert Layout(tmp_path).clear() == [tmp_path / "gates/mine/config.json", tmp_path / "report/mine.txt"]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(tmp_path / name for name in own)
    assert not (tmp_path / "distilled").exists() and not (tmp_path / "shards").exists()


def test_the_report_reads_a_document_for_each_window() -> None:
    template = yaml.safe_load((TEMPLATES / "report.yaml").read_text())
    assert template["measure"]["windows_per_document"] == 1  # its intervals are over documents
