"""`python -m eval longbench` on a tiny backbone, and its records."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval.tasks.longbench import TASKS, read_records
from eval.tasks.metrics import METRICS
from smartkv.errors import SmartKVError
from tests.lightning_fixtures import ROOT

SHARED = ROOT.parent / "shared" / "data" / "longctx"


def test_longbench_runs_every_task_with_its_metric(run_task: Any, tmp_path: Path, longbench_data: Path) -> None:
    changes = {"data": longbench_data, "samples": 1, "longest": 500, "contenders": '["window", "quant:int8"]'}
    found = run_task("longbench", tmp_path / "out", new_tokens=3, **changes)
    for name in {row["contender"] for row in found["rows"]}:
        samples = [sample for row in found["rows"] if row["contender"] == name for sample in row["samples"]]
        assert sorted(sample["group"] for sample in samples) == sorted([task] for task in TASKS)
        assert all(0 <= sample["score"] <= 1 for sample in samples)
    assert (tmp_path / "out" / "longbench.png").is_file()


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
