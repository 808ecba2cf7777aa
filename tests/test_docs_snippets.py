"""Every Python snippet of README and docs runs, in the order of its page, on a tiny random model.

The model has the shape of SmolLM2-135M's cache (30 layers × 3 KV heads × 64), so the shipped gates serve it.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import LlamaConfig, PreTrainedModel

import smartkv
from smartkv.models.backbone import freeze
from tests.markdown import PAGES, blocks
from tests.models import build, tiny_tokenizer

FAST = ("README", "use_the_cache", "choose_a_policy")  # run by `make test`
NEEDS = {"from kvpress import": "kvpress"}  # an extra with an environment of its own
GENERATED = re.compile(r"max_new_tokens=\d+")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    shape = {"num_hidden_layers": 30, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64}
    sizes = {"vocab_size": 264, "hidden_size": 48, "intermediate_size": 32, "max_position_embeddings": 2048}
    return build(LlamaConfig(**shape, **sizes, bos_token_id=256, eos_token_id=256), seed=0)


@pytest.fixture
def tiny(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever name a snippet loads, it gets the tiny model; what it writes goes to a folder of the test's own."""
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setattr(smartkv, "load_backbone", lambda name, *_, **__: freeze(model, tokenizer, name))
    monkeypatch.chdir(tmp_path)


def pages() -> list[Any]:
    marks = {True: [], False: [pytest.mark.slow]}
    chosen = [page for page in PAGES if blocks(page, "python")]
    return [pytest.param(page, marks=marks[page.stem in FAST], id=page.stem) for page in chosen]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", pages())
def test_the_snippets_of_a_page_run_one_after_another(page: Path, tiny: None) -> None:
    names: dict[str, Any] = {}
    for number, snippet in enumerate(blocks(page, "python")):
        if any(start in snippet and find_spec(extra) is None for start, extra in NEEDS.items()):
            continue
        shorter = GENERATED.sub("max_new_tokens=4", snippet)
        exec(compile(shorter, f"{page.name}, snippet {number + 1}", "exec"), names)
    assert names


def test_the_readmes_snippet_is_a_dozen_lines_on_a_plain_model() -> None:
    (snippet,) = blocks(PAGES[0], "python")
    assert len(snippet.splitlines()) <= 12
    assert "AutoModelForCausalLM" in snippet and "LifespanCache(" in snippet
