"""Settings of callbacks by class name, and the one line for what was mistyped."""

from pathlib import Path
from typing import Any

import pytest

from cli.options import set_callbacks, split_callback_settings
from smartkv.errors import SmartKVError
from tests.configs import FOLDER
from tests.lightning_fixtures import error_line, refused
from tests.test_configs import printed_config

GATES = FOLDER / "gates/smollm2.yaml"

# -- settings of callbacks --------------------------------------------------------------------------------------------


def test_the_options_of_callbacks_are_taken_out_of_a_command_line_with_or_without_an_equals_sign() -> None:
    typed = [
        "fit",
        "--trainer.callbacks.GateExport.dtype",
        "float16",
        "-c",
        "x",
        "--trainer.callbacks.0.init_args.a=b=c",
    ]
    rest, settings = split_callback_settings(typed)
    assert rest == ["fit", "-c", "x"]
    assert settings == [("GateExport", "dtype", "float16"), ("0", "a", "b=c")]


@pytest.mark.parametrize("option", ["--trainer.callbacks", "--trainer.callbacks+", "--trainer.callbacks.out"])
def test_the_options_that_jsonargparse_has_for_callbacks_are_left_to_it(option: str) -> None:
    assert split_callback_settings([option, "x"]) == ([option, "x"], [])


def test_an_option_without_a_value_is_refused() -> None:
    with pytest.raises(SmartKVError, match=r"GateExport\.dtype needs a value"):
        split_callback_settings(["fit", "--trainer.callbacks.GateExport.dtype"])


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("1e-3", 0.001), ("null", None), ("[0.1, 0.2]", [0.1, 0.2]), ("a: b: c", "a: b: c")]
)
def test_a_value_is_read_as_in_a_config(text: str, value: Any) -> None:
    assert set_callbacks([{"class_path": "a.B"}], [("B", "c", text)])[0]["init_args"] == {"c": value}


def test_callbacks_of_one_class_go_by_their_numbers() -> None:
    listed = [{"class_path": "a.B", "init_args": {"c": 1}}, {"class_path": "a.B", "init_args": {"c": 1}}]
    assert [each["init_args"]["c"] for each in set_callbacks(listed, [("1", "c", "2")])] == [1, 2]
    with pytest.raises(SmartKVError, match=r"several B: give --trainer\.callbacks\.0\.c or --trainer\.callbacks\.1\.c"):
        set_callbacks(listed, [("B", "c", "2")])


def test_a_callback_that_the_config_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(SmartKVError, match="no callback X, it has B"):
        set_callbacks([{"class_path": "a.B"}], [("X", "c", "2")])


def test_the_command_line_sets_a_callback_and_leaves_the_others() -> None:
    options = ["--trainer.callbacks.EarlyStopping.patience", "7", "--trainer.callbacks.GateExport.dtype=float16"]
    plain, changed = (printed_config("fit", "-c", GATES, *more)["trainer"]["callbacks"] for more in ([], options))
    for callback in plain:
        name = callback["class_path"].rpartition(".")[2]
        callback["init_args"] |= {"EarlyStopping": {"patience": 7}, "GateExport": {"dtype": "float16"}}.get(name, {})
    assert changed == plain


# -- one line ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--max_epochs 3", "unknown option --max_epochs: did you mean --trainer.max_epochs?"),
        ("--batch_size 3", "unknown option --batch_size: did you mean --data.batch_size?"),
        ("--trainer.max_epoxhs 3", "did you mean --trainer.max_epochs"),
        ("--model.hiden 3", "unknown key model.hiden: did you mean model.hidden?"),
        ("--model.init_args.hiden 3", "did you mean model.hidden?"),
        ("--model.hidden wide", "model.hidden: expected an int, got wide"),
        ("--trainer.max_epochs many", "trainer.max_epochs: expected an int, got many"),
        (
            "--trainer.callbacks.GateExport.dtyp half",
            "dtyp: did you mean trainer.callbacks.GateExport.dtype?",
        ),
        (
            "--trainer.callbacks.GateExport.dtype half",
            "dtype: expected one of ['float32', 'float16'], got half",
        ),
        ("--model.objective Log4Lifespans", "there is no class Log4Lifespans: did you mean Log4Lifespan"),
        ("--model.objective OrdinalAges --model.objective.ages []", "ages"),
        ("--model LifespanGate", "there is no class LifespanGate: did you mean LifespanGates"),
        ("-c none.yaml", "none.yaml"),
        ("--nonsense", "unknown option --nonsense"),
    ],
)
def test_a_mistyped_option_is_one_line_with_the_nearest_name(
    options: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "fit", "-c", GATES, *options.split())
    assert line in error_line(said) and "usage" not in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("modle: {a: 1}", "did you mean model?"),
        ("trainer: {max_epoch: 3}", "unknown key trainer.max_epoch: did you mean trainer.max_epochs"),
        ("trainer: {callbacks: [{class_path: GateExporter}]}", "no class GateExporter: did you mean GateExport"),
        ("data: {init_args: {treshold: 3}}", "unknown key data.treshold: did you mean data.threshold?"),
        ("a: [1", "Problems parsing config"),
    ],
)
def test_a_mistyped_key_of_a_file_is_one_line_with_the_nearest_name(
    content: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(content)
    said = refused(capsys, "fit", "-c", GATES, "-c", own)
    assert line in error_line(said) and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("args", [[], ["fitt"], ["fit"]])
def test_a_command_line_that_lacks_something_is_one_line(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *args)
    assert error_line(said) and len(said.strip().splitlines()) == 1
