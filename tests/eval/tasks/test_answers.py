"""Answers to prompts: likelihood, generated tokens, and keys that stay."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from eval.contenders.base import FullCache
from eval.contenders.registry import make_contenders
from eval.tasks.answers import Sample, answered, cut_in_the_middle, kept_share, prompt_ids
from smartkv import GateBank, HybridPolicy, LayerRule, LifespanCache, load_backbone
from smartkv.errors import SmartKVError
from tests.models import token_ids


def test_longbench_cuts_prompts_in_the_middle() -> None:
    assert cut_in_the_middle(range(10), 4) == (0, 1, 8, 9)
    assert cut_in_the_middle(range(10), 5) == (0, 1, 7, 8, 9)
    assert cut_in_the_middle(range(4), 4) == (0, 1, 2, 3)


def test_likelihood_and_greedy_tokens_are_those_of_the_model(lm: Any) -> None:
    prompt, answer = tuple(token_ids(60, 1).tolist()), tuple(token_ids(5, 2).tolist())
    sample = Sample(prompt, answer, ("x",), ())
    found = answered(lm, FullCache(lm), 1.0, sample, new_tokens=6)
    with torch.inference_mode():
        ids = torch.tensor([prompt + answer])
        logits = lm.model(ids, past_key_values=DynamicCache()).logits[0, len(prompt) - 1 : -1]
        want = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        ranks = [int((row > row[token]).sum()) for row, token in zip(logits, answer, strict=True)]
        greedy = lm.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
    assert found["nll"] == pytest.approx(float(want), abs=1e-5) and found["rank"] == max(ranks)
    assert found["generated"] == lm.tokenizer.decode(greedy[0, 60:], skip_special_tokens=True)
    again = answered(lm, FullCache(lm), 1.0, sample)
    assert again["nll"] == pytest.approx(found["nll"], abs=1e-5) and again["generated"] is None


def test_reading_and_decoding_agree_under_eviction(lm: Any, long_gates: Path) -> None:
    windows, gates = [token_ids(120, 5)], GateBank.from_pretrained(long_gates)
    for prompt, answer, new_tokens in ((100, 5, 2), (30, 90, 0)):  # a long answer is most of what counts
        sample = Sample(tuple(token_ids(prompt, 1).tolist()), tuple(token_ids(answer, 2).tolist()), ("x",), ())
        for contender in make_contenders(["all-gated", "window", "window+8bit"], lm, gates, windows, 30):
            setting = contender.solved(0.6)
            fed = answered(lm, contender, setting, sample, new_tokens)
            both = torch.tensor(sample.prompt + sample.answer)
            read = contender.read(setting, both, prompt, len(both) // 4, None)
            assert fed["nll"] == pytest.approx(float(read.nll.mean()), abs=2e-2 if "bit" in contender.name else 1e-4)
            assert fed["footprint"] == pytest.approx(read.footprint, abs=1e-6)


def test_what_is_kept_of_marked_tokens_is_what_the_window_holds(lm: Any) -> None:
    policy = HybridPolicy((LayerRule("all", "window", 10),), sinks=4)
    with torch.inference_mode(), LifespanCache(lm.model, None, policy) as cache:
        lm.model(token_ids(100)[None], past_key_values=cache)
        cache.settle()
        # of 100 tokens the next query sees the first 4 and the last 9
        for start, stop, share in ((0, 4, 1.0), (2, 6, 0.5), (50, 60, 0.0), (86, 96, 0.5), (95, 100, 1.0)):
            assert np.allclose(kept_share(cache, start, stop), share)


@pytest.mark.parametrize("name", ["gates@budget", "random@budget", "all-gated"])
@pytest.mark.parametrize("pinned", [True, False])
def test_instruction_and_question_stay_where_they_are_pinned(
    name: str, pinned: bool, lm: Any, long_gates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates, shares = GateBank.from_pretrained(long_gates), list[float]()

    def measured(cache: LifespanCache, start: int, stop: int) -> list[list[float]]:
        shares.extend(float(np.mean(kept_share(cache, *place))) for place in ((start, stop), (0, 30), (290, 300)))
        return [[0.0]]

    monkeypatch.setattr("eval.tasks.answers.kept_share", measured)
    prompt = tuple(token_ids(321, 1).tolist())
    sample = Sample(prompt, (), ("x",), (), marked=(30, 290), text=(30, 290))
    ending = "+pinned" if pinned else ""
    _, contender = make_contenders([name + ending], lm, gates, [token_ids(384, 5)], 30)
    assert contender.name == name + ending
    answered(lm, contender, contender.solved(0.5), sample, new_tokens=63)
    text, instruction, question = shares
    assert text < 0.9, "nothing of the text was evicted: the test shows nothing"
    assert bool(instruction == question == 1) is pinned


def test_a_budget_is_planned_for_prompt_and_answer(lm: Any, long_gates: Path) -> None:
    gates, plans = GateBank.from_pretrained(long_gates), list[int]()
    _, contender = make_contenders(["gates@budget"], lm, gates, [token_ids(96)], 30)
    opened = contender.open
    contender.open = lambda setting, first, plan, pins: (plans.append(plan), opened(setting, first, plan, pins))[1]
    for answer in ((), tuple(token_ids(90, 2).tolist())):
        sample = Sample(tuple(token_ids(40, 1).tolist()), answer, ("x",), ())
        answered(lm, contender, contender.solved(0.5), sample, new_tokens=20)
    assert plans == [60, 130]


def test_a_chat_is_asked_in_the_model_s_template(chatty: Path) -> None:
    tokenizer = load_backbone(str(chatty), "float32").tokenizer
    assert tokenizer.decode(prompt_ids(tokenizer, "Who?", True, " It is")) == "<user>Who?\n<assistant> It is"
    tokenizer.chat_template = None
    with pytest.raises(SmartKVError, match="no chat template"):
        prompt_ids(tokenizer, "Who?", True)
