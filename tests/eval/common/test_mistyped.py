"""What is mistyped after `python -m eval` is one line with the nearest name, and no screen of usage."""

from pathlib import Path

import pytest

from eval.__main__ import main
from eval.common.mistyped import one_line

PERPLEXITY = ("perplexity", "--config", "configs/eval/perplexity.yaml")
COMPARE = ("compare", "--config", "configs/eval/compare.yaml")


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The line of a command that is refused."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    said = capsys.readouterr()
    assert stop.value.code == 2 and not said.out and said.err.count("\n") == 1
    return said.err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ((*PERPLEXITY, "--polcies", "x"), "unknown option --polcies: did you mean --policies?"),
        ((*PERPLEXITY, "--wnidow", "3"), "unknown option --wnidow: did you mean --measure.window or"),
        ((*COMPARE, "--recall.trails", "3"), "unknown option --recall.trails: did you mean --recall.trials?"),
        (("gates", "--gates", "a", "--nonsense", "b"), "unknown option --nonsense"),
        (("baselines", "--memory-onyl"), "unknown option --memory_onyl: did you mean --memory_only?"),
        (("perplexty",), "unknown command perplexty: did you mean perplexity?"),
        (("fit",), "unknown command fit: expected one of anchors, auto, baselines"),
        ((), "expected a command, one of {anchors,"),
        (("perplexity",), "--out is required, and was not given"),
        (("--nonsense",), "unknown option --nonsense"),
        (("perplexity", "more", "words"), "unknown argument more words"),
        ((*PERPLEXITY, "--measure.window", "many"), "measure.window: expected an int, got many"),
        ((*PERPLEXITY, "--window", "many"), "measure.window: expected an int, got many"),
        ((*PERPLEXITY, "--measure.window", "2.5"), "measure.window: expected an int, got 2.5"),
        ((*COMPARE, "--footprints", "0.2,x"), "footprints: expected a list, got 0.2,x"),
        ((*COMPARE, "--footprints", "[0.2, x]"), "footprints: expected a float, got x"),
        ((*COMPARE, "--texts", "[{nam: books}]"), "unknown key texts.nam: did you mean texts.name?"),
        (
            (*PERPLEXITY, "--texts.split", "tset"),
            "texts.split: expected one of ['train', ",
        ),
        ((*PERPLEXITY, "--backbone"), "argument --model.backbone: expected one argument"),
        (("perplexity", "--config", "none.yaml"), "config: File does not exist"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_with_the_nearest_name(
    args: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, *args).startswith(line)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("polcies: [full]", "unknown key polcies: did you mean policies?"),
        ("measure: {widow: 3}", "unknown key measure.widow: did you mean measure.window?"),
        ("measure: {window: many}", "measure.window: expected an int, got many"),
        ("a: [1", "Problems parsing config"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_too(
    content: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(content)
    assert line in refused(capsys, "perplexity", "--config", str(own), "--out", str(tmp_path / "out"))


def test_help_is_still_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["perplexity", "--help"])
    assert stop.value.code == 0 and "--measure.window" in capsys.readouterr().out


def test_choices_may_stand_with_and_without_quotes() -> None:
    for choices in ("'fit', 'test'", "fit, test"):  # Python 3.11, and since 3.12
        said = one_line(f"argument subcommand: invalid choice: 'fitt' (choose from {choices})", [])
        assert said == "unknown command fitt: did you mean fit?"
