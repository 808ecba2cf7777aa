"""Reads README.md and docs/*.md: links, headings, code blocks, and the commands that a reader would type."""

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
# Nothing is installed for this shell: a command that is not found is printed. Loops and variables work as in any bash.
RECORDER = r"""
set -f
record() { printf '%s\x1f' "$@"; printf '\x1e'; }
command_not_found_handle() { record "$@"; }
source() { :; }
.venv-kvpress/bin/python() { record python "$@"; }
"""
RUNNERS = ("python ", "make ", "torchrun ", "sbatch ", "pytest ", "scripts/", ".venv-kvpress/")


@dataclass(frozen=True)
class Command:
    """One command of a page.

    Attributes:
        page: path of the page.
        words: the command and its arguments, as a shell hands them over.
    """

    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.stem}: {' '.join(self.words)}"[:100]


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return LINK.findall(INLINE.sub("", prose(page)))


def anchors(page: Path) -> set[str]:
    """Names by which `page#name` finds a heading, as GitHub makes them."""
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(prose(page)))
    return {heading.strip().replace(" ", "-") for heading in kept}


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of one language, in order."""
    return [code for name, code in FENCE.findall(page.read_text()) if name == language]


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks outside of code blocks."""
    return INLINE.findall(prose(page))


@cache
def commands(page: Path) -> tuple[Command, ...]:
    """Every command of the page's bash blocks, and of its inline code where nothing is left out by `…`."""
    inline = [
        code for code in inline_code(page) if code.startswith(RUNNERS) and "…" not in code and "PHASE" not in code
    ]
    script = "\n".join([RECORDER, *blocks(page, "bash"), *inline])
    shell = ["/bin/bash", "--norc", "--noprofile", "-c", script]
    done = subprocess.run(shell, env={"PATH": "/nonexistent"}, cwd="/", capture_output=True, text=True)
    recorded = [tuple(words.split("\x1f")[:-1]) for words in done.stdout.split("\x1e") if words]
    assert all(recorded), f"{page}: {done.stdout}"
    return tuple(Command(page, words) for words in recorded)
