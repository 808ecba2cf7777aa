"""Fixtures of the tests of tasks: a tiny backbone of many positions, gates, texts, records."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from eval.tasks.longbench import TASKS
from smartkv import load_backbone
from tests.eval.tasks.test_ruler_generator import many_words
from tests.lightning_fixtures import prose
from tests.models import save_random_gates, save_tiny_backbone


def contenders(found: dict[str, Any]) -> set[str]:
    return {row["contender"] for row in found["rows"]}


ALL = {"full", "all-gated", "window", "all-gated+4bit", "quant:int4", "key_norm"}


@pytest.fixture(scope="session")
def long_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token is a byte here: texts are long."""
    return save_tiny_backbone(tmp_path_factory.mktemp("long") / "backbone", max_positions=4096)


@pytest.fixture(scope="session")
def long_chatty(tmp_path_factory: pytest.TempPathFactory, long_backbone: Path) -> Path:
    """The same with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "backbone"
    shutil.copytree(long_backbone, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return folder


@pytest.fixture(scope="session")
def long_gates(tmp_path_factory: pytest.TempPathFactory, long_backbone: Path) -> Path:
    return save_random_gates(long_backbone, tmp_path_factory.mktemp("gates"))


@pytest.fixture(scope="session")
def long_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of many different words."""
    folder = tmp_path_factory.mktemp("texts")
    for number, split in enumerate(("train", "test")):
        for file in range(3):
            path = folder / split / f"{split}{file}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(many_words(1300, 10 * number + file))
    return folder


@pytest.fixture(scope="session")
def lm(long_backbone: Path) -> Any:
    return load_backbone(str(long_backbone), "float32")


@pytest.fixture
def run_task(long_backbone: Path, long_gates: Path, long_texts: Path) -> Callable[..., dict[str, Any]]:
    def run(command: str, out: Path, **changes: Any) -> dict[str, Any]:
        mine = [{"name": "mine", "path": str(long_texts)}]
        settings = (
            ({"config": changes.pop("config")} if "config" in changes else {})
            | {
                "out": out,
                "backbone": long_backbone,
                "gates": long_gates,
                "dtype": "float32",
                "contenders": '["all-gated", "window", "all-gated+4bit", "quant:int4", "key_norm"]',
                "footprints": "[0.5]",
                "calibration": json.dumps({"sources": mine, "windows": 1}),
            }
            | changes
        )
        if command in ("needle", "ruler"):
            settings["haystack"] = json.dumps(mine)
        main([command, *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])
        held_back = "_held_back" if changes.get("question") == "held_back" else ""
        return json.loads((out / f"{command}{held_back}.json").read_text())

    return run


@pytest.fixture
def longbench_data(tmp_path: Path) -> Path:
    """A folder with two records of every task."""
    folder = tmp_path / "data"
    folder.mkdir()
    for task in TASKS:
        records = [
            {"input": "Who?", "context": prose(900, n), "answers": ["Paragraph 3", "mill"], "all_classes": ["mill"]}
            for n in range(2)
        ]
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder
