"""Comments in configs/: every setting is explained, and every file says with which command it runs."""

from pathlib import Path

import pytest

from tests.configs import CONFIGS, OBJECTIVES, files_of, name_of
from tests.lightning_fixtures import ROOT


def unexplained(text: str) -> list[str]:
    """Return the settings without an explanation.

    A setting is a line `key: value`. It is explained by a comment on its line, by a comment line directly above it or
    above a block that it is in, or by an explained setting of the same name earlier in the file. `class_path` names a
    class, whose documentation explains it.
    """
    missing: list[str] = []
    known = {"class_path"}
    blocks: list[tuple[int, bool]] = []  # indent of each open block, and whether it is explained
    above = False  # a comment stands on the line before
    prose: int | None = None  # indent of the key whose value is the text of the lines below it
    for line in text.splitlines():
        content, indent = line.strip(), len(line) - len(line.lstrip())
        if prose is not None and (not content or indent > prose):
            continue
        prose = None
        if not content or content.startswith("#"):
            above = bool(content)
            continue
        while blocks and blocks[-1][0] >= indent:
            blocks.pop()
        setting, _, comment = content.removeprefix("- ").partition(" #")
        key, _, value = setting.partition(":")
        explained = bool(comment.strip()) or above or any(block for _, block in blocks)
        if value.strip().startswith((">", "|")):
            prose = indent
        if not value.strip():
            blocks.append((indent, explained))
        elif explained:
            known.add(key)
        elif key not in known:
            missing.append(content)
        above = False
    return missing


def test_the_search_for_unexplained_settings_finds_them() -> None:
    opening = "# of the file\n\na: 1\nb: 2  # said\n"
    text = opening + "c:\n  class_path: C\n  b: 3\n  d: 4\n# of the block\ne:\n  - {f: 5}\n  - g: 6\n"
    text += "h: >-  # a text\n  of lines: two\n  or three\n"
    assert unexplained(text) == ["a: 1", "d: 4"]


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_setting_is_explained(path: Path) -> None:
    assert unexplained(path.read_text()) == []


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_config_says_with_which_command_it_runs(path: Path) -> None:
    opening = path.read_text().partition("\n\n")[0]
    assert str(path.relative_to(ROOT)) in opening and ("python main.py" in opening or "python -m eval" in opening)


def test_an_overlay_begins_with_the_command_that_gives_it_after_its_base() -> None:
    overlays = [path for path in CONFIGS if "An overlay" in path.read_text()]
    assert set(OBJECTIVES) < set(overlays)
    for path in overlays:
        base, last = files_of(path)
        assert last == path and base.is_file() and files_of(base) == [base]
        first = path.read_text().partition("\n")[0]
        assert first == f"# python main.py fit -c {base.relative_to(ROOT)} -c {path.relative_to(ROOT)}"
