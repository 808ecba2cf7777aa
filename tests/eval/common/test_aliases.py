"""Old and short spellings on the command line and in `--config` files."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser, Namespace, auto_parser

from eval.__main__ import COMMANDS, main
from eval.common.aliases import FLAT_NAMES, PRESSES, SHORT_GROUPS, expand_aliases

FLAT_FLAGS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("flat_flags.yaml").read_text())


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    return auto_parser(COMMANDS, as_positional=False)


def parse(parser: ArgumentParser, *args: str) -> Any:
    """The command's options as nested dictionaries."""
    cfg: Namespace = parser.parse_args(expand_aliases(list(args)))
    return cfg[cfg["subcommand"]].as_dict()


def place_of(command: str, flag: str, value: Any) -> str:
    if command != "longbench" and flag in SHORT_GROUPS and not isinstance(value, dict):
        return SHORT_GROUPS[flag]
    return FLAT_NAMES.get(command, {}).get(flag, flag)


def at(options: dict[str, Any], place: str) -> Any:
    for name in place.split("."):
        options = options[name]
    return options


def same(expected: Any, value: Any) -> bool:
    """Whether a value is what was given; groups and sources that were given in part have their defaults besides."""
    if isinstance(expected, dict):
        return all(same(part, value[name]) for name, part in expected.items())
    if isinstance(expected, list):
        return len(expected) == len(value) and all(map(same, expected, value))
    return bool(expected == value)


@pytest.mark.parametrize("command", FLAT_FLAGS)
def test_every_flag_of_before_is_taken_on_the_command_line(command: str, parser: ArgumentParser) -> None:
    given = FLAT_FLAGS[command]
    words = [part for name, value in given.items() for part in (f"--{name}", as_word(value))]
    assert missing(command, parse(parser, command, *words)) == []
    joined = [f"--{name}={as_word(value)}" for name, value in given.items()]
    assert missing(command, parse(parser, command, *joined)) == []


@pytest.mark.parametrize("command", FLAT_FLAGS)
def test_every_key_of_before_is_taken_from_a_file(command: str, parser: ArgumentParser, tmp_path: Path) -> None:
    (tmp_path / "flat.yaml").write_text(yaml.safe_dump(FLAT_FLAGS[command], sort_keys=False))
    assert missing(command, parse(parser, command, "--config", str(tmp_path / "flat.yaml"))) == []


NEW = {"budgets", "code_completion", "kinds", "lookup"}  # commands that 0.1.0 did not have


def as_word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def missing(command: str, options: dict[str, Any]) -> list[str]:
    """Flags whose value did not come to its place."""
    given = FLAT_FLAGS[command]
    return [flag for flag, value in given.items() if not same(value, at(options, place_of(command, flag, value)))]


def test_the_commands_are_those_of_before() -> None:
    assert set(FLAT_FLAGS) <= set(COMMANDS) and set(FLAT_NAMES) - NEW < set(FLAT_FLAGS)


def test_flat_and_grouped_keys_of_one_file_come_together(parser: ArgumentParser, tmp_path: Path) -> None:
    (tmp_path / "mixed.yaml").write_text("model: {dtype: float32}\nbackbone: lm\nwindow: 64  # tokens\n")
    options = parse(parser, "compare", "--out", "o", f"--config={tmp_path / 'mixed.yaml'}", "--score_from", "32")
    assert (options["model"]["backbone"], options["model"]["dtype"]) == ("lm", "float32")
    assert (options["measure"]["window"], options["measure"]["score_from"], options["measure"]["seed"]) == (64, 32, 0)


def test_later_files_and_flags_change_only_what_they_give(parser: ArgumentParser, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("out: o\nbackbone: lm\ndtype: float32\nwindow: 64\n")
    (tmp_path / "b.yaml").write_text("dtype: bfloat16\nmeasure: {seed: 3}\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    options = parse(parser, "compare", *files, "--device", "cuda")
    assert options["model"] | {"adapter": None} == {
        "backbone": "lm",
        "dtype": "bfloat16",
        "device": "cuda",
        "trust_remote_code": False,
        "adapter": None,
    }
    assert (options["measure"]["window"], options["measure"]["seed"]) == (64, 3)


def test_values_of_a_file_are_read_as_the_parser_reads_them(parser: ArgumentParser, tmp_path: Path) -> None:
    content = "out: 'on'\ngates: \"1\"\nbackbone: '007'\nprice: 1e-3\nprompt: |\n  a: b\n  # c\n"
    (tmp_path / "c.yaml").write_text(content)
    options = parse(parser, "generate", "--config", str(tmp_path / "c.yaml"))
    assert (options["out"], options["gates"], options["model"]["backbone"]) == ("on", "1", "007")
    assert options["price"] == 0.001 and options["prompt"] == "a: b\n# c\n"


def test_a_config_may_stand_before_the_command_or_be_text(parser: ArgumentParser, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text("needle: {out: o, backbone: lm}\n")
    assert parse(parser, "--config", str(tmp_path / "all.yaml"), "needle")["model"]["backbone"] == "lm"
    assert parse(parser, "needle", "--config", "{out: o, backbone: lm}")["model"]["backbone"] == "lm"
    long = f"out: {'o' * 5000}\nbackbone: lm\n"  # longer than a file's name may be
    assert parse(parser, "needle", "--config", long)["model"]["backbone"] == "lm"


def test_a_group_may_be_given_as_a_file(parser: ArgumentParser, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("backbone: lm\ndtype: float32\n")
    options = parse(parser, "needle", "--out", "o", "--model", str(tmp_path / "model.yaml"))
    assert (options["model"]["backbone"], options["model"]["dtype"]) == ("lm", "float32")


def test_the_model_of_baselines_is_a_name_or_a_group(parser: ArgumentParser) -> None:
    assert parse(parser, "baselines", "--model", "smollm2-135m")["model"]["backbone"] == "smollm2-135m"
    options = parse(parser, "baselines", "--model", '{"backbone": "lm", "dtype": "bfloat16"}')
    assert (options["model"]["backbone"], options["model"]["dtype"]) == ("lm", "bfloat16")
    assert parse(parser, "baselines")["model"]["dtype"] == "float32"


def test_print_config_shows_the_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flat.yaml").write_text("out: o\nbackbone: lm\n")
    with pytest.raises(SystemExit) as stop:
        main(["needle", "--config", str(tmp_path / "flat.yaml"), "--dtype", "float32", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert stop.value.code == 0
    assert printed["model"] == {"backbone": "lm", "dtype": "float32", "device": "cpu", "trust_remote_code": False}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("out: o\nbackbone: lm\nwindwo: 3\n", "windwo"),
        ("out: o\nmeasure: {windwo: 3}\n", "windwo"),
        ("out: o\nbackbone: lm\nwindow: many\n", "measure.window"),
        ("out: o\nbackbone: [\n", "config"),
        (None, "config"),
        ("out: o\nbackbone: lm\nmodel: {backbone: other}\n", "'backbone' and 'model.backbone'"),
    ],
)
def test_a_mistake_in_a_file_is_told_in_a_line(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--config", str(tmp_path / "bad.yaml")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert any(line.startswith("error: ") and message in line for line in error.splitlines())


def test_flags_of_other_commands_are_left_alone() -> None:
    args = ["gates", "--out", "speed", "--device", "cuda", "--gates=g"]
    assert expand_aliases(args) == args
    assert expand_aliases([]) == [] and expand_aliases(["--help"]) == ["--help"]


def test_presses_is_compare_with_its_config(parser: ArgumentParser) -> None:
    options = parse(parser, "presses", "--prefill", "77")
    written = yaml.safe_load(PRESSES.read_text())
    assert (options["protocol"], options["prefill"]) == ("once", 77)
    assert options["contenders"] == written["contenders"] and "press:knorm" in options["contenders"]
