"""`python -m eval generate` on a tiny backbone: text, figures, page, and mistakes."""

import base64
import io
import json
import re
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from eval.__main__ import main
from eval.chat import generate as command
from eval.chat.choice import CHAT_PLAN, Choice, choose, shipped_gates
from smartkv import GateBank, HybridPolicy, LayerRule, load_backbone, pretrained_gates
from smartkv.metrics.perplexity import full_cache_bytes
from smartkv.policies.floating_price import MOVES
from tests.eval.chat.test_conversation import PROMPT, STATUS, lines
from tests.eval.chat.test_page import embedded
from tests.lightning_fixtures import ROOT

# -- a text -----------------------------------------------------------------------------------------------------------


def test_stdout_is_the_answer_and_stderr_one_line(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    written = run(prompt=PROMPT)
    said = capsys.readouterr()
    assert said.out == written["turns"][0]["answer"] + "\n" and written["turns"][0]["answer"]
    assert re.fullmatch(rf"{STATUS} · \S+/lifespans\.html\n", said.err)
    assert not re.search(r"[\x1b\r]", said.out + said.err), "control codes where there is no terminal"


def test_the_json_tells_what_the_cache_held(run: Any, tiny_backbone: Path) -> None:
    written = run(prompt=PROMPT)
    tokens = written["tokens"]
    assert tokens == len(PROMPT) + 19  # a byte is a token; the last one is never read
    lm = load_backbone(str(tiny_backbone), "float32")
    sizes = written["kv_bytes"]
    assert sizes["full"] == full_cache_bytes(lm.model, tokens)
    assert 0 < sizes["live"] <= sizes["peak"] and written["ms_per_token"] > 0
    assert written["text"] == PROMPT + written["turns"][0]["answer"]
    assert sum(written["bytes_by_layer"]) == written["kv_bytes"]["live"]
    assert len(written["live_keys_by_layer"]) == 2 and all(0 < live <= tokens for live in written["live_keys_by_layer"])
    turn = written["turns"][0]
    assert (turn["prompt_tokens"], turn["new_tokens"], turn["stopped"]) == (len(PROMPT), 20, "length")
    assert written["arguments"]["budget"]["footprint"] == 0.4


# -- a budget ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "keys"),
    [
        ({"footprint": 0.4}, 0.4 * (3 * len(PROMPT) + 20)),
        ({"footprint": 0.4, "plan": 200}, 80),
        ({"footprint": None, "max_tokens": 70}, 70),
        ({"footprint": None}, 0.25 * (3 * len(PROMPT) + 20)),
    ],
)
def test_a_budget_is_held_and_shown_beside_what_was_kept(
    budget: dict[str, Any], keys: float, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(prompt=PROMPT * 3, **budget)["report"]
    assert report["budget"] == pytest.approx(keys, abs=0.5)
    assert 0.8 * keys < report["held"] <= keys + MOVES / 2, "near the budget between two moves"
    assert f"{report['held']:.0f} of {report['budget']:.0f} keys a head" in capsys.readouterr().err


def test_a_budget_of_bytes_is_held(run: Any) -> None:
    written = run(prompt=PROMPT * 5, footprint=None, max_bytes="60kB", max_new_tokens=60)
    assert 20_000 < written["kv_bytes"]["live"] <= 60_000 < written["kv_bytes"]["full"] * 2


def test_a_chat_is_planned_for_its_whole_length(run: Any, chatty: Path) -> None:
    report = run(prompt="hello", chat="true", backbone=chatty)["report"]
    assert report["budget"] == pytest.approx(0.4 * CHAT_PLAN, abs=0.5)


def test_gates_that_know_no_shares_of_layers_get_them_from_the_texts(run: Any, aged: Path) -> None:
    solved = [layer["budget"] for layer in run(prompt=PROMPT * 5, gates=aged)["report"]["layers"]]
    bank = GateBank.from_pretrained(aged)
    bank.details["layer_shares"] = [[0.4, [0.9, 0.1]]]
    bank.save_pretrained(aged)
    remembered = [layer["budget"] for layer in run(prompt=PROMPT * 5, gates=aged)["report"]["layers"]]
    assert remembered[0] > 4 * remembered[1] and solved != remembered
    assert sum(solved) == pytest.approx(sum(remembered), abs=1)


def test_the_report_is_shown_on_a_terminal(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "is_terminal", lambda: True)
    run(prompt=PROMPT * 3)
    assert "footprint=0.4: " in (said := capsys.readouterr().err) and "of full" in said


CAPPED = """
sinks: 4
price: -0.02
rules: [{layers: all, rule: gated, window: 8}]
max_tokens: """


@pytest.mark.parametrize("policy", [None, "all-gated", f"{CAPPED} 40", f"{CAPPED} 50\nmax_tokens_per: layer", "window"])
def test_the_page_tells_the_same_footprint_as_the_cache(policy: str | None, run: Any, tmp_path: Path) -> None:
    if policy and "\n" in policy:
        (tmp_path / "capped.yaml").write_text(policy)
        policy = str(tmp_path / "capped.yaml")
    written = run(prompt=PROMPT * 3, policy=policy)
    data = embedded(tmp_path / "out/lifespans.html")
    assert "".join(data["tokens"]) == written["text"] and data["generated"].count("1") == 20
    ends = np.frombuffer(base64.b64decode(data["expiry"]), "<u2").reshape(4, -1).astype(int)
    tokens = written["tokens"]
    seen = sum(int((ends[:, : t + 1] > t).sum()) for t in range(tokens))
    assert seen / (4 * sum(range(1, tokens + 1))) == pytest.approx(written["footprint"], abs=1e-9)
    assert written["footprint"] < 0.8, "nothing was evicted: the test shows nothing"
    held = [(ends[2 * layer : 2 * layer + 2, :tokens] > tokens).sum() / 2 for layer in range(2)]
    assert written["live_keys_by_layer"] == held


def test_a_prompt_alone_is_read_where_nothing_shall_be_answered(
    run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written = run(prompt=PROMPT, max_new_tokens=0)
    assert written["tokens"] == len(PROMPT) and capsys.readouterr().out == ""
    assert embedded(tmp_path / "out/lifespans.html")["tokens"] == list(PROMPT)


def test_a_full_policy_without_gates_says_what_the_model_says(run: Any, tiny_backbone: Path) -> None:
    answer = run(prompt=PROMPT, policy="full", gates=None)["turns"][0]["answer"]
    lm = load_backbone(str(tiny_backbone), "float32")
    inputs = lm.tokenizer(PROMPT, return_tensors="pt")
    plain = lm.model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == lm.tokenizer.decode(plain, skip_special_tokens=True)


def test_a_file_is_a_prompt_like_any_other(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    assert run(prompt_file=file)["text"] == run(prompt=PROMPT)["text"]


@pytest.mark.parametrize("prompt", ["5", "a: b", "[1, 2]", "{x", "two\nlines", "true", "été 🐈"])
def test_a_prompt_is_taken_as_it_is_written(prompt: str, run: Any, tmp_path: Path) -> None:
    assert run(prompt=prompt, max_new_tokens=1)["turns"][0]["prompt"] == prompt
    assert "".join(embedded(tmp_path / "out/lifespans.html")["tokens"]).startswith(prompt)


def test_sampling_follows_the_seed(run: Any) -> None:
    hot = [run(prompt=PROMPT, temperature=2.0, seed=seed)["text"] for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert run(prompt=PROMPT, temperature=2.0, top_p=1e-9)["text"] == run(prompt=PROMPT)["text"]


def test_a_price_takes_the_place_of_the_solved_one(run: Any) -> None:
    dear, cheap = (run(prompt=PROMPT * 3, price=price) for price in (99, -99))
    assert dear["arguments"]["policy"]["price"] == 99 and cheap["footprint"] == 1 > dear["footprint"]


# -- gates, and what they remember -----------------------------------------------------------------------------------


@pytest.fixture
def aged(tmp_path: Path, tiny_backbone: Path) -> Path:
    """Gates that judge for ages and remember a policy and its prices, like those that come with SmartKV."""
    policy = HybridPolicy((LayerRule("all", "gated", 8),), name="distilled").to_dict()
    details = {"ages": [8, 24], "target": "log worth", "policy": policy, "prices": [[0.04, 0.2], [0.9, -0.2]]}
    fingerprint = load_backbone(str(tiny_backbone), "float32").fingerprint
    torch.manual_seed(0)
    GateBank(fingerprint, None, 8, 2, details).save_pretrained(tmp_path / "aged")
    return tmp_path / "aged"


def test_gates_that_remember_prices_are_used_at_once(run: Any, aged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "plan_windows", lambda *_, **__: pytest.fail("texts were read to solve a price"))
    monkeypatch.setattr(Choice, "solved", lambda *_: pytest.fail("a price was solved"))
    bank = GateBank.from_pretrained(aged)
    bank.details["layer_shares"] = [[0.4, [0.5, 0.3]]]
    bank.save_pretrained(aged)
    chosen = run(prompt=PROMPT * 3, gates=aged)["arguments"]
    assert chosen["policy"]["name"] == "distilled" and chosen["budget"]["footprint"] == 0.4
    assert run(prompt=PROMPT * 3, gates=aged, price=9)["arguments"]["policy"]["price"] == 9


def test_gates_that_judge_for_ages_are_shown_in_nats_and_by_age(
    run: Any, aged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "is_terminal", lambda: True)
    run(prompt=PROMPT * 3, gates=aged, price=-1)
    said = capsys.readouterr().err
    assert f"gates {aged}, window 8, price -1.00 (worth 0.37 nats, asked at the ages of 8 and 24 tokens)" in said
    assert "lifespan of" not in said
    scale = embedded(tmp_path / "out/lifespans.html")["scale"]
    assert (scale["unit"], scale["said"], scale["ages"]) == ("nats", "worth", [8, 24])
    assert "worth at age 24, nats" in scale["caption"]
    assert "how long later tokens" not in (tmp_path / "out/lifespans.html").read_text().split("<main>")[0]


def test_without_a_name_the_shipped_gates_are_those_of_the_model(tiny_backbone: Path) -> None:
    architecture = load_backbone(str(tiny_backbone), "float32").architecture
    assert shipped_gates(architecture) is None
    shape = GateBank.from_pretrained("smollm2-135m-instruct").fingerprint
    same = replace(architecture, layers=shape.layers, kv_heads=shape.kv_heads, head_dim=shape.head_dim)
    assert shipped_gates(same) == "smollm2-135m-instruct"


def test_the_config_needs_nothing_that_a_fresh_checkout_lacks() -> None:
    written = yaml.safe_load((ROOT / "configs/eval/generate.yaml").read_text())
    assert written["gates"] in pretrained_gates() and written["model"]["backbone"] == "smollm2-135m"
    remembered = GateBank.from_pretrained(written["gates"])
    figures = ("policy", "price", "footprint", "max_tokens", "max_bytes", "plan")
    chosen = choose(*(written[name] for name in figures), written["chat"], remembered, 30)
    assert chosen.policy.rules == HybridPolicy.from_dict(remembered.details["policy"]).rules
    assert chosen.budget is not None and chosen.budget.footprint == 0.25 and not chosen.needs_texts
    defaults = signature(command.generate).parameters
    assert all(defaults[name].default == written[name] for name in (*figures, "seed"))


def test_solving_a_price_shows_how_far_it_is(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr(command, "Console", lambda stderr: terminal)
    run(prompt=PROMPT, policy="all-gated")
    assert "Solving the price" in shown.getvalue() and "100%" in shown.getvalue()


def test_a_short_text_is_told_to_outweigh_a_full_cache(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = run(prompt="a", max_new_tokens=2)["kv_bytes"]
    said = capsys.readouterr().err
    assert sizes["live"] > sizes["full"], "the test shows nothing"
    assert re.match(r"KV [\d.]+ KiB with spare slots, full [\d.]+ KiB, 100 % of the keys · 2 tokens", said)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_new_tokens": 500}, "are more than the model's 512 positions"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more, got -1"),
        ({"prompt_file": "x.txt"}, "prompt and prompt_file are both given"),
        ({"prompt": None, "prompt_file": "/no/such/file"}, "/no/such/file cannot be read (FileNotFoundError)"),
        ({"prompt": None, "prompt_file": "."}, ". cannot be read (IsADirectoryError)"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n "}, "the prompt is empty"),
        ({"policy": "alll-gated"}, "policy 'alll-gated' is neither one of"),
        ({"gates": None}, "but no gates were given"),
        ({"temperature": -0.5}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"footprint": 0.0}, "footprint must be the share"),
        ({"footprint": 1e-6, "policy": "all-gated"}, "cannot keep 1e-06 of the cache"),
        ({"max_tokens": 50}, "footprint and max_tokens both say how much may be kept"),
        ({"footprint": None, "max_tokens": 3}, "max_tokens=3 leaves 3 keys a KV head, but"),
        ({"footprint": None, "max_bytes": "much"}, "max_bytes must be a number of bytes"),
        ({"footprint": None, "max_tokens": 50, "price": 1}, "price=1 decides what stays"),
        ({"plan": 0}, "plan must be"),
        ({"plan": 300, "policy": "window"}, "policy 'window' leaves window open"),
        ({"policy": "window", "price": 2.0}, "policy 'window' asks no gates"),
        ({"chat": "true"}, "has no chat template"),
        ({"calibration_windows": 0}, "calibration needs at least 1 window"),
        ({"calibration_window": 600}, "longer than the model's 512 positions"),
    ],
)
def test_a_mistake_is_one_line_before_any_token(
    changes: dict[str, Any], said: str, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(**{"prompt": PROMPT} | changes)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and not (tmp_path / "out").exists()
    assert captured.err.startswith("error: ") and said in captured.err and captured.err.count("\n") == 1


def test_the_config_runs(
    tmp_path: Path, chatty: Path, train_texts: Path, random_gates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {
        "out": str(tmp_path / "out"),
        "gates": str(random_gates),
        "backbone": str(chatty),
        "calibration_window": 64,
    }
    config = tmp_path / "config.yaml"
    sources = [{"name": "mine", "path": str(train_texts)}]
    config.write_text(yaml.safe_dump(small | {"sources": sources, "footprint": 0.4, "max_new_tokens": 5}))
    lines(monkeypatch, "hello")
    main(["generate", "--config", str(ROOT / "configs/eval/generate.yaml"), "--config", str(config)])
    assert len(json.loads((tmp_path / "out/generate.json").read_text())["turns"]) == 1
    assert (tmp_path / "out/lifespans.html").stat().st_size > 10_000
