"""README and docs: every link leads somewhere, every path, name and command that they mention is there."""

import contextlib
import io
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

import main
from cli.make_gates import main as make_gates_main
from eval.__main__ import COMMANDS
from eval.__main__ import main as eval_main
from tests.lightning_fixtures import run_cli
from tests.markdown import PAGES, ROOT, Command, anchors, blocks, commands, inline_code, links

FOLDERS = ("callbacks", "configs", "datamodules", "docs", "eval", "lightning_modules", "scripts", "smartkv", "tests")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w/?|(?<![\w./-])[A-Z]\w+\.(?:md|cff)(?!\w)")
DOTTED = re.compile(r"^smartkv(?:\.\w+)+$")
WRITTEN_FOR_OTHERS = ("pip", "tensorboard", "git")  # no commands of this project
FAST = ("README", "getting_started")  # pages whose commands are parsed by `make test`
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
VARIABLES = set(re.findall(r"\$\((\w+)\b", (ROOT / "Makefile").read_text()))
ALL = [command for page in PAGES for command in commands(page)]


def name(page: Path) -> str:
    return page.stem


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_picture_and_anchor_leads_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = page.parent / target if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)  # it names old ones
def test_every_path_of_the_checkout_that_a_page_mentions_is_there(page: Path) -> None:
    code = [*inline_code(page), *blocks(page, "bash"), *blocks(page, "python")]
    mentioned = {path for part in code for path in PATH.findall(part)}
    missing = {path for path in mentioned if not any(ROOT.glob(path))}
    assert {path for path in missing if not (path.startswith("scripts/train_eit") or "…" in path)} == set()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_name_of_the_library_that_a_page_mentions_can_be_imported(page: Path) -> None:
    for code in inline_code(page):
        if DOTTED.match(code) and code != "smartkv.press" and page.name != "CHANGELOG.md":
            resolve_name(code)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=name)
def test_every_page_stands_in_the_sites_table_of_contents(page: Path) -> None:
    listed = (ROOT / "docs/index.md").read_text()
    assert page.stem == "index" or re.search(rf"^(.*<)?{re.escape(page.stem)}>?$", listed, re.MULTILINE)


CODE = ("smartkv", "eval", "lightning_modules", "datamodules", "cli")


def test_every_message_that_troubleshooting_explains_is_one_that_the_code_gives() -> None:
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in files))  # strings over several lines
    table = (ROOT / "docs/troubleshooting.md").read_text().partition("## Messages")[2].partition("##")[0]
    messages = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(messages) > 5
    parts = {message: [part.strip(" '") for part in message.split("…")] for message in messages}
    assert {message for message, found in parts.items() if not all(part in source for part in found)} == set()


def test_the_readme_fits_on_150_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_commands_are_read_as_a_shell_reads_them() -> None:
    words = {command.words for command in ALL}
    assert ("make", "demo") in words
    assert ("python", "main.py", "predict", "-c", "configs/harvest/smollm2.yaml") in words
    assert len({c.words for c in ALL if c.page.stem == "results_eviction_tuning"}) > 9  # its loops are run


@pytest.mark.parametrize("command", dict.fromkeys(c for c in ALL if c.words[0] != "python"), ids=str)
def test_a_command_of_another_program_is_one_that_the_checkout_has(command: Command) -> None:
    program, *rest = command.words
    if program == "make":
        variables = {word.partition("=")[0] for word in rest if "=" in word}
        assert {word for word in rest if "=" not in word} <= TARGETS and variables <= VARIABLES
    elif program in ("torchrun", "sbatch"):
        assert "main.py" in rest or any(word.endswith("fit.sh") for word in rest)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
    else:
        assert program in WRITTEN_FOR_OTHERS or (ROOT / program).is_file()


def parsed() -> list[object]:
    """Commands whose settings a parser of this project reads, each once; the slow ones marked."""
    found = {}
    for command in ALL:
        if project_arguments(command):
            found.setdefault(project_arguments(command), command)
    marks = {True: [], False: [pytest.mark.slow]}
    return [pytest.param(c, marks=marks[c.page.stem in FAST], id=str(c)) for c in found.values()]


def project_arguments(command: Command) -> tuple[str, ...]:
    """(main.py, eval or make_gates, its arguments …); nothing for other programs."""
    words = command.words
    if words[:3] == ("python", "-m", "eval"):
        return ("eval", *words[3:])
    if words[:3] == ("python", "-m", "cli.make_gates"):
        return ("make_gates", *words[3:])
    for start in ("main.py", "scripts/slurm/fit.sh"):
        if start in words:
            return ("main.py", *words[words.index(start) + 1 :])
    return ()


@pytest.mark.parametrize("command", parsed())
def test_the_parser_takes_every_option_that_a_page_gives(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *arguments = project_arguments(command)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        if program == "eval":
            assert arguments[0] in COMMANDS
            eval_main([*arguments, "--print_config"])
        elif program == "make_gates":
            make_gates_main([*arguments, "--print_config"])
        else:
            run_cli(*arguments, "--print_config")
    assert stop.value.code == 0 and printed.getvalue()


def test_a_wrong_option_would_not_pass() -> None:
    assert main.main
    with pytest.raises(SystemExit) as stop:
        eval_main(["anchors", "--out", "x", "--no_such_option", "1", "--print_config"])
    assert stop.value.code != 0
