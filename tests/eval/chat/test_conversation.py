"""A conversation: one cache, what a terminal shows, Ctrl-C, and what is recorded."""

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from eval.chat import generate as command
from eval.chat.conversation import Conversation, RecordingCache
from eval.chat.page import UNDECIDED
from eval.common.options import Sampling
from smartkv import GateBank, load_backbone
from smartkv.models.architecture import Fingerprint
from smartkv.policies.named import read_policy
from tests.eval.conftest import TEMPLATE

PROMPT = "the river ran down to an old mill where nobody had lived since winter"
FULL = read_policy("full", 2)
KEPT = r"( · [\d,]+ of [\d,]+ keys a head)?"
STATUS = rf"KV [\d.]+ [KM]iB of [\d.]+ [KM]iB full \(\d+ %\) · [\d,]+ tokens{KEPT}( · \d+ ms/token)?"


def lines(monkeypatch: pytest.MonkeyPatch, *typed: str) -> None:
    """What the user types."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))


def test_a_conversation_has_one_cache_and_feeds_only_what_is_new(
    run: Any, chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken: list[Conversation] = []
    figures = command._figures
    monkeypatch.setattr(command, "_figures", lambda last: (spoken.append(last), figures(last))[1])
    lines(monkeypatch, "hello", "and you", "", "never read")
    written = run(backbone=chatty, chat="true", policy="full", gates=None)
    first, second = (turn["answer"] for turn in written["turns"])
    assert written["text"] == f"<user>hello\n<assistant>{first}\n<user>and you\n<assistant>{second}"
    for parts in spoken[0].cache.recorded:
        read = torch.cat([position for position, *_ in parts]).tolist()
        assert read == list(range(written["tokens"])), "a token was read twice, or not at all"
    lm = load_backbone(str(chatty), "float32")  # what the model says to the same text with a cache of its own
    ids = torch.tensor([spoken[0].ids[:-20]])
    plain = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert plain[0].tolist() == spoken[0].ids


def test_without_chat_each_line_is_a_text_of_its_own(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = run(prompt="second")
    capsys.readouterr()
    lines(monkeypatch, "first", "second")
    written = run()
    assert written["text"] == alone["text"] and written["tokens"] == alone["tokens"]
    said = capsys.readouterr()
    assert said.out.endswith(alone["turns"][0]["answer"] + "\n") and len(said.err.splitlines()) == 1


def test_an_answer_that_the_model_closed_is_not_closed_twice(chatty: Path) -> None:
    lm = load_backbone(str(chatty), "float32")
    end = lm.tokenizer.eos_token
    lm.tokenizer.chat_template = TEMPLATE.replace("\n", end)
    spoken = Conversation(lm, None, FULL, chat=True)
    generation = command._generation(lm, Sampling(1))
    spoken.say("a", generation)
    spoken.ids[-1] = lm.tokenizer.eos_token_id
    spoken.say("b", generation)
    assert lm.tokenizer.decode(spoken.ids[:-1]) == f"<user>a{end}<assistant>{end}<user>b{end}<assistant>"


def test_a_line_that_does_not_fit_is_said_and_the_next_is_answered(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines(monkeypatch, "x" * 500, "short")
    written = run()
    assert [turn["prompt"] for turn in written["turns"]] == ["short"]
    said = capsys.readouterr().err
    assert "error: 500 tokens of text and 20 new ones are more than the model's 512 positions" in said


def test_nothing_said_leaves_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(monkeypatch)
    assert run() == {}


# -- what is recorded -------------------------------------------------------------------------------------------------


def test_what_is_not_judged_yet_is_left_open(tiny_backbone: Path, random_gates: Path) -> None:
    lm = load_backbone(str(tiny_backbone), "float32")
    cache = RecordingCache(lm.model, GateBank.from_pretrained(random_gates), FULL)
    keys, position = torch.randn(1, 2, 5, 8), torch.arange(5)[None]
    for layer in range(2):
        cache.expiry(layer, keys, position, None)
    predictions, expiry = cache.decisions(7)
    want = torch.stack([cache.gates.predict(layer, keys)[0, ..., 0] for layer in range(2)])
    assert torch.equal(predictions[..., :5], want.detach()) and predictions[..., 5:].isnan().all()
    assert (expiry[..., 5:] == UNDECIDED).all() and (expiry[..., :5] > 5).all()


def test_of_gates_that_judge_for_ages_the_last_is_shown(tiny_backbone: Path) -> None:
    lm = load_backbone(str(tiny_backbone), "float32")
    gates = GateBank(Fingerprint.of(lm.model), outputs=2, details={"ages": [4, 16]})
    cache, keys = RecordingCache(lm.model, gates, FULL), torch.randn(1, 2, 5, 8)
    for layer in range(2):
        cache.expiry(layer, keys, torch.arange(5)[None], None)
    want = torch.stack([gates.score(layer, keys)[0, ..., 1] for layer in range(2)])
    assert torch.equal(cache.decisions(5)[0], want.detach())


@pytest.mark.parametrize("text", ["plain words", "été — “quoted” 🐈\n\n  end", "🐈"])
def test_token_texts_make_up_the_text(text: str, tiny_backbone: Path) -> None:
    lm = load_backbone(str(tiny_backbone), "float32")
    spoken = Conversation(lm, None, FULL)
    spoken.ids = lm.tokenizer(text)["input_ids"]
    texts = spoken.token_texts()
    assert "".join(texts) == text and len(texts) == len(spoken.ids)


def test_token_texts_keep_the_space_that_a_tokenizer_drops_at_the_start(tiny_backbone: Path) -> None:
    lm = load_backbone(str(tiny_backbone), "float32")
    words = Tokenizer(WordLevel({"▁one": 0, "▁two": 1}))
    words.decoder = decoders.Metaspace()
    spoken = Conversation(replace(lm, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words)), None, FULL)
    spoken.ids = [0, 1, 1]
    assert spoken.token_texts() == ["one", " two", " two"]
