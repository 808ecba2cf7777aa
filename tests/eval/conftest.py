"""What the tests of `python -m eval …` share: a tiny backbone that chats, its gates, the command; measurements here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from eval.__main__ import main
from eval.common.isolated import _peak
from smartkv.models.backbone import Backbone, load_backbone
from tests.eval.gates.fixtures import demo_rows, demo_run, demo_scores, recall_shards  # noqa: F401
from tests.eval.tasks.fixtures import (  # noqa: F401
    lm,
    long_backbone,
    long_chatty,
    long_gates,
    long_texts,
    longbench_data,
    run_task,
)
from tests.lightning_fixtures import write_texts
from tests.models import save_random_gates

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def train_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), splits=["train"])


@pytest.fixture(scope="session")
def random_gates(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    return save_random_gates(tiny_backbone, tmp_path_factory.mktemp("gates"))


@pytest.fixture(scope="session")
def tiny_lm(tiny_backbone: Path) -> Backbone:
    return load_backbone(str(tiny_backbone), "float32")


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """The tiny backbone with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "backbone"
    shutil.copytree(tiny_backbone, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, tiny_backbone: Path, train_texts: Path, random_gates: Path) -> Any:
    """Runs the command; its JSON."""

    def run(**changes: Any) -> dict[str, Any]:
        settings = {
            "out": tmp_path / "out",
            "gates": random_gates,
            "backbone": tiny_backbone,
            "dtype": "float32",
            "sources": json.dumps([{"name": "mine", "path": str(train_texts)}]),
            "calibration_window": 64,
            "footprint": 0.4,
            "max_new_tokens": 20,
        } | changes
        given = {name: value for name, value in settings.items() if value is not None}
        main(["generate", *(part for name, value in given.items() for part in (f"--{name}", str(value)))])
        written = tmp_path / "out/generate.json"
        return json.loads(written.read_text()) if written.exists() else {}

    return run


@pytest.fixture(params=["here", pytest.param("apart", marks=pytest.mark.slow)])
def measured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements in this process, as each of their own starts for seven seconds; the slow tests have those."""

    def here(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        return {"peak_memory": _peak()} | measure(*arguments)

    if request.param == "here":
        for module in ("eval.speed.harvest", "eval.speed.gate_training"):
            monkeypatch.setattr(f"{module}.run_isolated", here)
