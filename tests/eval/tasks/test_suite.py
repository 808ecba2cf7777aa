"""Needle, RULER and LongBench on a tiny backbone, and what all tasks share."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import DynamicCache

from eval.contenders.base import FullCache
from eval.contenders.registry import make_contenders
from eval.eviction.recall import trial
from eval.tasks import suite as tasks
from eval.tasks.answers import Sample, answered, cut_in_the_middle, kept_share, prompt_ids
from eval.tasks.longbench import TASKS, read_records
from eval.tasks.metrics import METRICS
from eval.tasks.needle import _sample as needle_sample
from eval.tasks.ruler_generator import FAMILIES
from smartkv import GateBank, HybridPolicy, LayerRule, LifespanCache, load_backbone
from smartkv.errors import SmartKVError
from smartkv.policies.budgets import Calibration
from tests.eval.tasks.fixtures import ALL, contenders
from tests.eval.tasks.test_ruler_generator import many_words
from tests.lightning_fixtures import prose
from tests.models import token_ids

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "data" / "longctx"


def test_the_needle_is_read_at_every_depth_and_length_by_everybody(run_task: Any, tmp_path: Path) -> None:
    changes = {"lengths": "[400, 600]", "depths": 3, "samples": 2, "new_tokens": 4}
    found = run_task("needle", tmp_path, **changes)
    assert contenders(found) == ALL
    for row in found["rows"]:
        groups = [tuple(sample["group"]) for sample in row["samples"]]
        assert sorted(set(groups)) == [(row["length"], round(place, 3)) for place in (1 / 6, 0.5, 5 / 6)]
        for sample in row["samples"]:
            assert sample["nll"] > 0 and sample["rank"] >= 0 and sample["right"] == (sample["rank"] == 0)
            assert (sample["generated"] is None) == (row["contender"] == "key_norm")
            assert (sample["kept"] is None) == (row["kind"] in ("full", "quantised") or row["contender"] == "key_norm")
        footprint = float(np.mean([sample["footprint"] for sample in row["samples"]]))
        assert footprint == pytest.approx(1.0 if row["kind"] in ("full", "quantised") else 0.5, abs=0.12)
    for name in ("needle_right.png", "needle_nll.png", "needle.md"):
        assert (tmp_path / name).stat().st_size > 300


def test_a_killed_run_goes_on_where_it_stopped(run_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"lengths": "[400]", "depths": 2, "samples": 1, "new_tokens": 0, "contenders": '["window"]'}
    plain, calls = tasks.answered, []

    def stops(*args: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(tasks, "answered", stops)
    with pytest.raises(KeyboardInterrupt):
        run_task("needle", tmp_path, **changes)
    monkeypatch.setattr(tasks, "answered", lambda *args: calls.append(1) or plain(*args))
    monkeypatch.setattr(Calibration, "measure", None)  # prices are known
    found = run_task("needle", tmp_path, **changes)
    assert len(calls) == 4 == sum(len(row["samples"]) for row in found["rows"])


def test_ruler_runs_all_families_and_scores_what_is_generated(run_task: Any, tmp_path: Path) -> None:
    changes = {"lengths": "[2400]", "samples": 1, "contenders": '["all-gated", "window"]'}
    found = run_task("ruler", tmp_path, **changes)
    for row in found["rows"]:
        assert [sample["group"][0] for sample in row["samples"]] == list(FAMILIES)
        assert all(0 <= sample["score"] <= 1 and sample["nll"] > 0 for sample in row["samples"])
    assert (tmp_path / "ruler_score.png").is_file() and (tmp_path / "ruler_nll.png").is_file()


def test_mistakes_in_ruler_are_told(run_task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes in ({"lengths": "[200]"}, {"families": '["qa"]'}, {"lengths": "[6000]", "samples": 1}):
        with pytest.raises(SystemExit):
            run_task("ruler", tmp_path, **changes)
        assert capsys.readouterr().err.startswith("error: ")


# -- LongBench ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def longbench_data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for task in TASKS:
        records = [
            {"input": "Who?", "context": prose(900, n), "answers": ["Paragraph 3", "mill"], "all_classes": ["mill"]}
            for n in range(2)
        ]
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def test_longbench_runs_every_task_with_its_metric(run_task: Any, tmp_path: Path, longbench_data: Path) -> None:
    changes = {"data": longbench_data, "samples": 1, "longest": 500, "contenders": '["window", "quant:int8"]'}
    found = run_task("longbench", tmp_path / "out", new_tokens=3, **changes)
    for name in {row["contender"] for row in found["rows"]}:
        samples = [sample for row in found["rows"] if row["contender"] == name for sample in row["samples"]]
        assert sorted(sample["group"] for sample in samples) == sorted([task] for task in TASKS)
        assert all(0 <= sample["score"] <= 1 for sample in samples)
    assert (tmp_path / "out" / "longbench.png").is_file()


def test_longbench_cuts_prompts_in_the_middle() -> None:
    assert cut_in_the_middle(range(10), 4) == (0, 1, 8, 9)
    assert cut_in_the_middle(range(10), 5) == (0, 1, 7, 8, 9)
    assert cut_in_the_middle(range(4), 4) == (0, 1, 2, 3)


def test_longbench_s_records_may_hold_lists_as_text(tmp_path: Path) -> None:
    record = {"input": "", "context": "c", "answers": "['one', \"it's two\"]", "all_classes": None}
    (tmp_path / "trec.jsonl").write_text(json.dumps(record))
    (found,) = read_records(str(tmp_path), "trec", None)
    assert found["answers"] == ["one", "it's two"] and found["all_classes"] == []
    (tmp_path / "lcc.jsonl").write_text(json.dumps({"input": ""}))
    with pytest.raises(SmartKVError, match="lacks context, answers"):
        list(read_records(str(tmp_path), "lcc", None))
    with pytest.raises(SmartKVError, match=r"no qasper\.jsonl"):
        list(read_records(str(tmp_path), "qasper", None))


@pytest.mark.parametrize(
    ("line", "says"), [(b"123", "no object"), (b"null", "no object"), (b'{"input": "\xff"}', "not JSON")]
)
def test_damaged_records_are_told(line: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "trec.jsonl").write_bytes(line)
    with pytest.raises(SmartKVError, match=says):
        list(read_records(str(tmp_path), "trec", None))


def test_an_answer_that_looks_like_a_number_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "trec.jsonl").write_text(json.dumps({"input": "", "context": "", "answers": "3.10"}))
    assert next(read_records(str(tmp_path), "trec", None))["answers"] == ["3.10"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published sample lies beside the project, and is no part of it")
def test_longbench_reads_the_published_multi_news(tmp_path: Path) -> None:
    (tmp_path / "multi_news.jsonl").symlink_to(SHARED / "longbench_multi_news.jsonl")
    found = list(read_records(str(tmp_path), "multi_news", 5))
    assert len(found) == 5 and all(len(record["answers"]) == 1 and record["context"] for record in found)
    assert METRICS["rouge"](found[0]["answers"][0], found[0]["answers"][0], ()) > 0.99


# -- what all share ---------------------------------------------------------------------------------------------------


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


def test_what_is_kept_share_marked_tokens_is_what_the_window_holds(lm: Any) -> None:
    policy = HybridPolicy((LayerRule("all", "window", 10),), sinks=4)
    with torch.inference_mode(), LifespanCache(lm.model, None, policy) as cache:
        lm.model(token_ids(100)[None], past_key_values=cache)
        cache.settle()
        # of 100 tokens the next query sees the first 4 and the last 9
        for start, stop, share in ((0, 4, 1.0), (2, 6, 0.5), (50, 60, 0.0), (86, 96, 0.5), (95, 100, 1.0)):
            assert np.allclose(kept_share(cache, start, stop), share)


def test_the_marked_tokens_of_a_needle_are_its_statement(lm: Any, long_texts: Path) -> None:
    text = torch.tensor(lm.tokenizer(many_words(200, 1))["input_ids"][:600])
    made = trial("test", 0, 0.5, lm.tokenizer, text[:504], np.random.default_rng(0))
    sample = needle_sample(SimpleNamespace(lm=lm), made, 600, text)
    start, stop = sample.marked
    stated = lm.tokenizer.decode(sample.prompt[start:stop])
    assert sample.references[0] in stated and stated.strip().endswith(".")


def test_a_chat_is_asked_in_the_model_s_template(chatty: Path) -> None:
    tokenizer = load_backbone(str(chatty), "float32").tokenizer
    assert tokenizer.decode(prompt_ids(tokenizer, "Who?", True, " It is")) == "<user>Who?\n<assistant> It is"
    tokenizer.chat_template = None
    with pytest.raises(SmartKVError, match="no chat template"):
        prompt_ids(tokenizer, "Who?", True)


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("needle", {"lengths": "[400]", "depths": 1, "samples": 1, "new_tokens": 2}),
        ("ruler", {"lengths": "[2400]", "samples": 1, "families": '["niah_single_2"]'}),
        ("longbench", {"tasks": '["trec"]', "samples": 1, "longest": 300, "new_tokens": 2}),
        ("reasoning", {"sets": '["math500"]', "samples": 1, "shots": 1, "new_tokens": 2}),
    ],
)
def test_the_config_runs(
    command: str,
    changes: dict[str, Any],
    run_task: Any,
    tmp_path: Path,
    longbench_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ROOT / f"configs/eval/{command}.yaml"
    written = yaml.safe_load(config.read_text())
    problems = [{"problem": f"{n} + 2?", "solution": f"$\\boxed{{{n + 2}}}$", "unique_id": str(n)} for n in range(40)]
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "math500.jsonl").write_text("\n".join(map(json.dumps, problems)))
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path))
    names = [name.replace("gates", "all-gated") for name in written["contenders"]]
    more = {"data": longbench_data} if command == "longbench" else {}
    found = run_task(command, tmp_path / "out", config=config, contenders=json.dumps(names), **changes, **more)
    assert contenders(found) == {"full", *names}
    assert set(written) >= set(found["arguments"]) & {"gates", "contenders", "footprints", "backbone", "seed", "split"}


# -- on the GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_tasks_on_the_gpu_find_what_they_find_on_the_cpu(run_task: Any, tmp_path: Path) -> None:
    named = [*ALL - {"full"}, "quant:kivi", "quant:adaptive_gates", "h2o"]
    changes = {"lengths": "[400]", "depths": 2, "samples": 1, "new_tokens": 4, "contenders": json.dumps(named)}
    cpu, gpu = (run_task("needle", tmp_path / name, device=name, **changes) for name in ("cpu", "cuda"))
    assert contenders(gpu) == contenders(cpu) == {"full", *named}
    for mine, theirs in zip(gpu["rows"], cpu["rows"], strict=True):
        packed = mine["kind"] == "quantised" or "bit" in mine["contender"]  # a rounding that falls the other way
        for one, other in zip(mine["samples"], theirs["samples"], strict=True):
            assert one["nll"] == pytest.approx(other["nll"], abs=0.05 if packed else 5e-3), mine["contender"]
            assert one["footprint"] == pytest.approx(other["footprint"], abs=0.01)
