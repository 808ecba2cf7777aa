"""What the folder of a run remembers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cli.recipe.configs import Layout
from cli.recipe.record import RECORD, Record, open_record
from cli.recipe.settings import Options
from smartkv.errors import SmartKVError
from smartkv.texts.sources import SourceConfig
from tests.cli.fixtures import a_look, layout_of

OPTIONS = Options("m", sources=[SourceConfig("pg19")])


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """The folder of a run that has looked, and finished the harvest and the lifespans."""
    layout = layout_of(tmp_path / "out")
    record = Record(layout, OPTIONS, a_look())
    for step in ("harvest", "lifespans"):
        touch(layout.result(step))
        record.finish(step, 1.23)
    return layout


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def test_a_run_is_read_back_as_it_was_written(layout: Layout) -> None:
    record = open_record(layout, OPTIONS, overwrite=False)
    assert record.look == a_look() and record.seconds == {"harvest": 1.2, "lifespans": 1.2}
    assert record.done == {"harvest", "lifespans"}


def test_a_step_without_its_result_is_not_done(layout: Layout) -> None:
    layout.result("lifespans").unlink()
    assert open_record(layout, OPTIONS, False).done == {"harvest"}


def test_a_result_without_an_end_is_not_done(layout: Layout) -> None:
    touch(layout.result("distilled"))  # exported by a fit that was killed later
    assert open_record(layout, OPTIONS, False).done == {"harvest", "lifespans"}


def test_what_only_earlier_steps_needed_is_not_made_again(layout: Layout) -> None:
    layout.result("harvest").unlink()
    assert open_record(layout, OPTIONS, False).done == {"harvest", "lifespans"}


def test_a_report_counts_only_with_the_gates_whose_card_has_it(layout: Layout) -> None:
    record = open_record(layout, OPTIONS, False)
    touch(layout.result("report"))
    record.finish("report", 1.0)
    assert "report" not in record.done
    touch(layout.gates / "config.json")
    assert "report" in record.done and "distilled" in record.done


def test_a_new_folder_begins_a_run(tmp_path: Path) -> None:
    record = open_record(layout_of(tmp_path / "new"), OPTIONS, overwrite=False)
    assert record.look is None and record.done == set()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (replace(OPTIONS, backbone="n"), "backbone m, now n"),
        (replace(OPTIONS, sources=[SourceConfig("c4")]), "sources "),
        (replace(OPTIONS, sources=None), "sources "),
        (replace(OPTIONS, dtype="float32"), "dtype auto, now float32"),
    ],
)
def test_another_option_is_refused_and_named(layout: Layout, options: Options, said: str) -> None:
    with pytest.raises(SmartKVError, match=f"holds gates of other options .*{said}.*--overwrite"):
        open_record(layout, options, overwrite=False)


def test_opening_a_run_writes_and_deletes_nothing(layout: Layout, tmp_path: Path) -> None:
    before = sorted(layout.out.rglob("*"))
    assert open_record(layout, replace(OPTIONS, seed=1), overwrite=True).look is None
    assert sorted(layout.out.rglob("*")) == before
    open_record(Layout(tmp_path / "new" / "folder"), OPTIONS, overwrite=False)
    assert not (tmp_path / "new").exists()


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SmartKVError, match="file is no folder"):
        open_record(Layout(tmp_path / "file" / "out"), OPTIONS, overwrite=False)


def test_overwriting_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gates").mkdir()
    with pytest.raises(SmartKVError, match="holds gates, which this command did not make"):
        open_record(Layout(tmp_path), OPTIONS, overwrite=True)
    assert (tmp_path / "gates").is_dir()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"options": {}}',
        '{"options": {}, "look": null, "seconds": {}}',
        '{"options": 1, "look": {}, "seconds": {}}',
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_record_that_is_damaged_or_of_something_else_is_refused(
    layout: Layout, content: str, overwrite: bool
) -> None:
    (layout.out / RECORD).write_text(content)
    with pytest.raises(
        SmartKVError, match=r"recipe\.json .*: nothing was deleted; give it a folder of its own"
    ) as told:
        open_record(layout, OPTIONS, overwrite)
    assert "--overwrite" not in str(told.value)


def test_a_record_of_another_version_is_refused(layout: Layout) -> None:
    content = json.loads((layout.out / RECORD).read_text())
    del content["look"]["layers"]
    (layout.out / RECORD).write_text(json.dumps(content))
    with pytest.raises(SmartKVError, match="written by another version of SmartKV"):
        open_record(layout, OPTIONS, overwrite=False)
