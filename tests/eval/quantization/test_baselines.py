"""`python -m eval baselines`: bytes, errors, times and perplexity of quantised caches."""

import json
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from eval.common.aliases import expand_aliases
from eval.quantization import baselines as command
from eval.quantization import stand_ins as models
from tests.lightning_fixtures import write_texts

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), splits=["validation"])


def result(out: Path) -> dict[str, Any]:
    (path,) = out.glob("*.json")
    return json.loads(path.read_text())


def test_memory_alone_needs_no_model_and_gives_nominal_and_stored_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_backbone", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setitem(models.SHAPES, "gpt2", models.Shape(3, 2, 64))
    everything = ["--baselines", "FP16", "INT8", "INT4", "KIVI", "KIVI2", "KIVI4", "SmartKV"]
    main(["baselines", "--memory-only", *everything, "--tokens", "2048", "--out", str(tmp_path)])
    found = result(tmp_path)["baselines"]
    payload = {name: row["ratio_payload"] for name, row in found.items()}
    assert payload.pop("SmartKV") == pytest.approx(0.45, abs=0.02)
    assert payload == {"FP16": 1.0, "INT8": 0.5, "INT4": 0.25, "KIVI": 0.1875, "KIVI2": 0.125, "KIVI4": 0.25}
    stored = {name: row["ratio_stored"] for name, row in found.items()}
    assert stored["INT8"] == 0.5625 and stored["INT4"] == 0.3125 and stored["FP16"] == 1.0
    # residuals of 128 to 160 and 64 to 128 tokens stay in float16
    assert 0.25 < stored["KIVI"] < 0.25 + 160 / 2048 and 0.48 < stored["SmartKV"] < 0.5 + 128 / 2048
    assert found["INT8"]["bytes_float16"] == 2 * 2 * 3 * 2 * 64 * 2048
    log = (tmp_path / "validation.log").read_text()
    assert "INT4" in log and "written:" in log


def test_memory_alone_has_errors_and_times_of_synthetic_keys(tmp_path: Path) -> None:
    names = ["FP16", "INT8", "INT4", "KIVI", "SmartKV"]
    main(["baselines", "--memory-only", "--baselines", *names, "--tokens", "256", "--out", str(tmp_path)])
    found = result(tmp_path)
    rows = found["baselines"]
    for what in ("key", "value", "output"):
        assert rows["FP16"][f"error_{what}"] < rows["INT8"][f"error_{what}"] < rows["INT4"][f"error_{what}"]
    assert rows["INT8"]["error_output"] < rows["SmartKV"]["error_output"] < rows["INT4"]["error_output"]
    assert all(row["encode_ms"] > 0 and row["decode_ms"] > 0 for row in rows.values())
    judged = [judgement["fine"] for judgement in found["judgements"]]
    assert judged.count(True) > 8 and False not in judged


def test_what_is_not_as_expected_gives_a_status_of_its_own_after_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(command.SCHEMES, "int4", command.SCHEMES["int8"])
    with pytest.raises(SystemExit) as stop:
        main(["baselines", "--memory-only", "--baselines", "INT8", "INT4", "--tokens", "64", "--out", str(tmp_path)])
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert "NOT as expected: ratio_payload of INT4 is 0.25 (0.5000)" in said.out
    assert said.err == "5 of 6 expectations do not hold\n"
    assert [each["fine"] for each in result(tmp_path)["judgements"]].count(False) == 5


def test_a_model_is_measured(tmp_path: Path, tiny_backbone: Path, texts: Path) -> None:
    sources = json.dumps([{"name": "mine", "path": str(texts)}])
    arguments = ["--baselines", "FP16", "INT8", "INT4", "KIVI4", "SmartKV", "--num-prompts", "2", "--tokens", "256"]
    arguments += ["--residual", "64", "--budget", "0.6"]
    written = ["--out", str(tmp_path), "--experiment-id", "mine"]
    main(["baselines", "--model", str(tiny_backbone), *arguments, "--sources", sources, *written])
    found = json.loads((tmp_path / "mine.json").read_text())["baselines"]
    for key in ("error_key", "error_value", "error_output"):
        assert found["FP16"][key] < found["INT8"][key] < found["INT4"][key] < 0.5
        assert found["FP16"][key] < found["SmartKV"][key] < found["INT4"][key] and 0 < found["KIVI4"][key] < 0.5
    for row in found.values():
        assert row["encode_ms"] > 0 and row["decode_ms"] > 0 and row["step_ms"] > 0
        assert row["perplexity"] == pytest.approx(row["perplexity_exact"], rel=0.1)
    assert found["FP16"]["perplexity"] == pytest.approx(found["FP16"]["perplexity_exact"], rel=1e-4)


def test_where_gpt2_cannot_be_had_its_shape_stands_in_and_says_so(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: Any) -> Any:
        raise models.SmartKVError("no network")

    monkeypatch.setattr(models, "load_backbone", gone)
    monkeypatch.setitem(models.SHAPES, "gpt2", models.Shape(2, 2, 16))
    sources = json.dumps([{"name": "mine", "path": str(texts)}])
    options = ["--num-prompts", "1", "--tokens", "128", "--sources", sources, "--out", str(tmp_path)]
    main(["baselines", "--baselines", "INT8", *options])
    found = result(tmp_path)
    assert "random weights" in found["stand_in"] and "perplexity" not in found["baselines"]["INT8"]
    assert "their perplexity means nothing" in capsys.readouterr().out.replace("\n", " ")
    assert found["baselines"]["INT8"]["error_output"] > 0


def test_git_ignores_the_folder_that_results_go_to_by_default() -> None:
    folder = signature(command.baselines).parameters["out"].default.split("/")[0]
    assert f"/{folder}/" in (ROOT / ".gitignore").read_text().split()


def test_the_old_spelling_is_understood() -> None:
    given = ["baselines", "--baselines", "FP16", "KIVI", "--num-prompts", "3", "--memory-only", "--device=cpu"]
    want = ["baselines", "--baselines", '["FP16", "KIVI"]', "--num_prompts", "3", "--memory_only", "true"]
    assert expand_aliases(given) == [*want, "--model.device", "cpu"]
    assert expand_aliases(want) == want
    assert expand_aliases(["compare", "--memory-only"]) == ["compare", "--memory-only"]
    presses = expand_aliases(["presses", "--seed", "1"])
    assert presses[:2] == ["compare", "--config"] and Path(presses[2]).is_file()
    assert presses[3:] == ["--measure.seed", "1"]


@pytest.mark.parametrize(
    "command", [["-m", "smartkv.experiments.validate_baselines", "--memory-only"], ["scripts/test_validation.py"]]
)
def test_the_old_names_answer(command: list[str], tmp_path: Path) -> None:
    options = ["--baselines", "FP16", "INT4", "--tokens", "64", "--out", str(tmp_path)]
    run = subprocess.run([sys.executable, *command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert result(tmp_path)["baselines"]["INT4"]["ratio_payload"] == 0.25


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--baselines", "INT5"], "there are no baselines ['INT5']"),
        (["--num-prompts", "0"], "num_prompts must be at least 1"),
        (["--model", "no/such"], "could not be loaded"),
        (["--budget", "0.1", "--memory-only"], "budget"),
        (["--model", "TINY", "--tokens", "513"], "longer than the model's 512 positions"),
    ],
)
def test_mistakes_are_told(
    changes: list[str],
    says: str,
    tmp_path: Path,
    tiny_backbone: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changes = [str(tiny_backbone) if each == "TINY" else each for each in changes]
    with pytest.raises(SystemExit):
        main(["baselines", "--out", str(tmp_path), *changes])
    assert says in capsys.readouterr().err
