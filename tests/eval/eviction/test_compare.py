"""`python -m eval compare` on a tiny backbone: who is measured, and on what."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval.__main__ import main
from eval.contenders.registry import DEFAULT
from eval.eviction import compare as command
from smartkv import GateBank
from tests.lightning_fixtures import write_texts

ROOT = Path(__file__).parents[3]
WINDOW, FIRST = 64, 20


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), splits=["train", "test"])


def run(out: Path, backbone: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    mine = [{"name": "mine", "path": str(folder)}]
    settings = {
        "out": out,
        "backbone": backbone,
        "dtype": "float32",
        "texts": json.dumps([{"name": "books", "sources": mine, "windows": 3}]),
        "recall": json.dumps({"trials": 4, "tokens": 50}),
        "haystack": json.dumps(mine),
        "calibration": json.dumps(mine),
        "calibration_windows": 2,
        "window": WINDOW,
        "windows_per_document": 20,
        "score_from": FIRST,
        "contenders": '["all-gated", "window", "null:constant", "null:token_table", "oracle:attention"]',
        "footprints": "[0.8, 0.5]",
    } | changes
    main(["compare", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])
    return json.loads((out / "compare.json").read_text())


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, texts: Path, random_gates: Path
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("compare")
    return out, run(out, tiny_backbone, texts, gates=random_gates)


def recalled(found: dict[str, Any]) -> int:
    """Trials that the full cache gets right: no other cache is asked the rest."""
    return sum(trial["right"] for trial in found["full"]["recall_trials"])


def test_every_contender_is_read_at_every_footprint_on_texts_and_trials(compared: Any) -> None:
    out, found = compared
    assert len(found["full"]["recall_trials"]) == 4
    names = {(row["contender"], row["target"]) for row in found["rows"]}
    assert {name for name, _ in names} >= {"all-gated", "window", "null:token_table", "oracle:attention"}
    for row in found["rows"]:
        own = row["texts"]["books"]
        assert len(own["delta_nll_window"]) == 3 and len(row["recall_trials"]) == recalled(found)
        assert own["interval"][0] <= own["delta_nll"] <= own["interval"][1]
        assert 0.3 < own["footprint"] < 1 and own["peak_bytes"] > 0
    assert (out / "frontier_books.png").stat().st_size > 10_000


def test_the_window_at_a_footprint_keeps_that_footprint(compared: Any) -> None:
    for row in compared[1]["rows"]:
        if row["contender"] == "window":
            assert row["texts"]["books"]["footprint"] == pytest.approx(row["target"], abs=0.03)


def test_a_run_goes_on_where_it_stopped_and_new_contenders_join(
    compared: Any, tiny_backbone: Path, texts: Path, random_gates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, before = compared
    read = []
    figures = command._figures
    monkeypatch.setattr(command, "_figures", lambda found: read.append(1) or figures(found))
    again = run(out, tiny_backbone, texts, gates=random_gates)
    assert not read and again["rows"] == before["rows"]
    more = run(out, tiny_backbone, texts, gates=random_gates, contenders='["window", "null:position"]')
    assert (
        len(read)
        == (3 + recalled(before)) * len([row for row in more["rows"] if row["contender"] == "null:position"])
        > 0
    )


def test_other_gates_in_the_same_folder_leave_the_rules_as_measured(
    tmp_path: Path, tiny_backbone: Path, texts: Path, random_gates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"contenders": '["all-gated", "window"]', "footprints": "[0.8]"}
    before = run(tmp_path, tiny_backbone, texts, gates=random_gates, **changes)
    read: list[str] = []
    measured = command.Measurements.measured
    monkeypatch.setattr(
        command.Measurements,
        "measured",
        lambda self, key, how: measured(self, key, lambda: read.append(key[0]) or how()),
    )
    others = GateBank.from_pretrained(random_gates)
    with torch.no_grad():
        for weight in others.parameters():
            weight.mul_(1.5)
    others.save_pretrained(tmp_path / "others")
    run(tmp_path, tiny_backbone, texts, gates=tmp_path / "others", **changes)
    assert read == ["solved"] + ["all-gated"] * (3 + recalled(before))


def test_others_than_gates_and_window_may_be_asked_for_fewer_footprints(
    tmp_path: Path, tiny_backbone: Path, texts: Path, random_gates: Path
) -> None:
    changes = {"gates": random_gates, "contenders": '["all-gated", "window", "key_norm"]', "others": "[0.8]"}
    found = run(tmp_path, tiny_backbone, texts, footprints="[0.9, 0.8]", **changes)["rows"]
    targets = {name: [row["target"] for row in found if row["contender"] == name] for name in ("window", "key_norm")}
    assert targets == {"window": [0.8, 0.9], "key_norm": [0.8]}


def test_every_rule_is_read_at_the_footprint_asked_for(tmp_path: Path, tiny_backbone: Path, texts: Path) -> None:
    rules = ["random", "key_norm", "keydiff", "snapkv", "tova", "h2o", "expected_attention"]
    for protocol in ("stream", "once"):
        changes = {"protocol": protocol, "prefill": 40, "footprints": "[0.9]", "contenders": json.dumps(rules)}
        found = run(tmp_path / protocol, tiny_backbone, texts, **changes)["rows"]
        assert [row["contender"] for row in found] == rules  # five seeds of `random` are one row
        footprints = [row["texts"]["books"]["footprint"] for row in found]
        assert max(footprints) - min(footprints) < 1e-9 and footprints[0] > 0.8
        losses = [row["texts"]["books"]["delta_nll"] for row in found]
        assert len(set(losses)) == len(rules)
        weights = {row["contender"] for row in found if row["needs"] == "attention weights"}
        assert weights == {"snapkv", "tova", "h2o"}


def test_quantised_caches_and_packed_survivors_stand_on_an_axis_of_bytes(
    tmp_path: Path, tiny_backbone: Path, texts: Path, random_gates: Path
) -> None:
    names = [
        "all-gated",
        "all-gated+k6v4",
        "window+8bit",
        "quant:fp16",
        "quant:int8",
        "quant:int4",
        "quant:kivi",
        "quant:int8@16",
    ]
    changes = {"gates": random_gates, "footprints": "[0.7]", "contenders": json.dumps(names)}
    found = {row["contender"]: row for row in run(tmp_path, tiny_backbone, texts, **changes)["rows"]}
    assert list(found) == [*names[:2], *names[3:], "window+8bit"]
    stored = {name: row["texts"]["books"]["stored"] for name, row in found.items()}
    losses = {name: abs(row["texts"]["books"]["delta_nll"]) for name, row in found.items()}
    assert stored["quant:fp16"] == pytest.approx(1.0)
    assert stored["quant:int4"] < stored["quant:int8"] < 1 and losses["quant:fp16"] < losses["quant:int4"]
    assert stored["quant:int8"] < stored["quant:int8@16"] < 1  # the latest 16 tokens are exact
    assert stored["all-gated+k6v4"] < 0.7 * stored["all-gated"]
    assert (tmp_path / "bytes_books.png").stat().st_size > 10_000


def test_the_protocol_once_keeps_that_share_of_the_prefill(
    tmp_path: Path, tiny_backbone: Path, texts: Path, random_gates: Path
) -> None:
    changes = {"protocol": "once", "prefill": 48, "footprints": "[0.85]", "gates": random_gates}
    found = run(tmp_path, tiny_backbone, texts, **changes)
    queries = range(47, WINDOW - 1)
    assert {row["contender"] for row in found["rows"]} >= {"all-gated", "window", "oracle:attention"}
    for row in found["rows"]:
        seen = [48] + [0.85 * 48 + query - 47 for query in queries[1:]]
        whole = [query + 1 for query in queries]
        assert row["texts"]["books"]["footprint"] == pytest.approx(sum(seen) / sum(whole), abs=0.04)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"contenders": '["null:nothing"]'}, "there is no contender 'null:nothing'"),
        ({"contenders": '["gates"]'}, "give --gates"),
        ({"contenders": '["all-gated"]'}, "no gates were given"),
        ({"contenders": '["nobody"]'}, "policy 'nobody' is neither"),
        ({"footprints": "[0.0]"}, "footprints are shares"),
        ({"score_from": 64}, "below the window of 64"),
        ({"protocol": "once", "prefill": 60}, "recall.tokens 50 must be at least the prefill of 60"),
        ({"texts": "[]", "recall": '{"trials": 0}'}, "there must be texts or recall trials"),
    ],
)
def test_mistakes_are_told_in_a_line(
    wrong: dict[str, Any],
    said: str,
    tmp_path: Path,
    tiny_backbone: Path,
    texts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, tiny_backbone, texts, **wrong)
    assert stop.value.code == 2 and said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "path",
    [ROOT / f"configs/eval/{name}.yaml" for name in ("compare", "policies", "bytes", "eit")],
    ids=lambda path: path.stem,
)
def test_the_config_runs(path: Path, tmp_path: Path, tiny_backbone: Path, texts: Path, random_gates: Path) -> None:
    written = yaml.safe_load(path.read_text())
    mine = [{"name": "mine", "path": str(texts)}]
    # a policy for gates that remember none; what `eval auto` would have written
    chosen = {"gates": str(tmp_path / "own.yaml"), "runs/auto/auto.yaml": str(tmp_path / "auto.yaml")}
    for name in chosen.values():
        Path(name).write_text(f"name: {Path(name).stem}\nrules: [{{layers: all, rule: gated, window: 4}}]\n")
    small = {
        "window": WINDOW,
        "score_from": FIRST,
        "prefill": 30,
        "calibration_windows": 2,
        "footprints": [0.9],
        "others": [0.9],
    }
    tiny = {"out": str(tmp_path / "out"), "gates": str(random_gates), "backbone": str(tiny_backbone)}
    sources = {
        "texts": [text | {"split": "test", "windows": 1, "sources": mine} for text in written["texts"]],
        "recall": {"split": "test", "trials": 2, "tokens": 40},
        "haystack": mine,
        "calibration": mine,
        "windows_per_document": 20,
        "dtype": "float32",
        "contenders": ["+".join([chosen.get(n, n) for n in name.split("+")]) for name in written["contenders"]],
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(small | tiny | sources))
    main(["compare", "--config", str(path), "--config", str(config)])
    rows = json.loads((tmp_path / "out/compare.json").read_text())["rows"]
    assert {row["contender"] for row in rows} == {
        Path(name.split("+")[0]).stem + "".join(f"+{bits}" for bits in name.split("+")[1:])
        for name in sources["contenders"]
    }
    assert {text for row in rows for text in row["texts"]} == {text["name"] for text in written["texts"]}


@pytest.mark.gpu
def test_on_the_gpu_everybody_loses_what_he_loses_on_the_cpu(
    tmp_path: Path, tiny_backbone: Path, texts: Path, random_gates: Path
) -> None:
    names = [*DEFAULT[:2], "all-gated", *DEFAULT[2:]]
    names.remove("gates")  # these have no policy of their own
    changes = {"gates": random_gates, "contenders": json.dumps(names)}
    cpu, gpu = (run(tmp_path / name, tiny_backbone, texts, device=name, **changes) for name in ("cpu", "cuda"))
    assert [row["contender"] for row in gpu["rows"]] == [row["contender"] for row in cpu["rows"]]
    for mine, theirs in zip(gpu["rows"], cpu["rows"], strict=True):
        one, other = mine["texts"]["books"], theirs["texts"]["books"]
        assert one["delta_nll"] == pytest.approx(other["delta_nll"], abs=0.01), mine["contender"]
        assert one["footprint"] == pytest.approx(other["footprint"], abs=0.01), mine["contender"]


def test_facts_are_asked_for_in_books_code_and_chats(tmp_path: Path, tiny_backbone: Path, texts: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / "code" / split).mkdir(parents=True)
    code = "import os\n\n\n" + "".join(f"def f_{n}():\n    return {n}\n\n\n" for n in range(60))
    (tmp_path / "code" / "test" / "a.py").write_text(code)
    (tmp_path / "chats" / "test").mkdir(parents=True)
    talk = [{"role": role, "content": f"word {n}"} for n in range(40) for role in ("user", "assistant")]
    (tmp_path / "chats" / "test" / "a.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    recall = {"trials": 1, "tokens": 50, "kinds": ["books", "code", "chat"], "forms": "foreign"} | {
        "code_haystack": [{"name": "code", "path": str(tmp_path / "code")}],
        "chat_haystack": [{"name": "chat", "path": str(tmp_path / "chats")}],
    }
    changes = {"recall": json.dumps(recall), "contenders": "[window]", "footprints": "[0.8]"}
    found = run(tmp_path / "out", tiny_backbone, texts, texts="[]", **changes)
    assert [trial["kind"] for trial in found["full"]["recall_trials"]] == ["books", "code", "chat"]
    assert set(found["full"]["recall"]["kinds"]) == {"books", "code", "chat"}
    assert found["arguments"]["recall"]["kinds"] == ["books", "code", "chat"]
    assert "facts recalled" in (tmp_path / "out" / "compare.md").read_text()
