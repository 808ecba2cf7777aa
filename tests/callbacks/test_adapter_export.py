"""The exported adapter: plain peft reads it, it says how it was trained, and a killed run still leaves it."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.lightning_fixtures import run_cli, write_config
from tests.models import token_ids
from tests.tuning_fixtures import config, weights, write_long_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, texts: Path) -> Path:
    """Two epochs of four steps."""
    out = tmp_path_factory.mktemp("tuned")
    run_cli("fit", "-c", write_config(out / "run.yaml", config(out, tiny_backbone, texts)))
    return out


def test_what_is_left_loads_with_plain_peft_and_is_what_was_merged(tuned: Path, tiny_backbone: Path) -> None:
    ids = token_ids(40)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_backbone, dtype=torch.float32)
    with torch.inference_mode():
        plain = base(ids).logits
        with_adapter = PeftModel.from_pretrained(base, tuned / "final").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tuned / "final" / "merged", dtype=torch.float32)(ids).logits
    assert torch.allclose(with_adapter, merged, atol=1e-4) and not torch.allclose(with_adapter, plain, atol=1e-2)
    schedule = json.loads((tuned / "final" / "schedule.json").read_text())
    assert schedule["schedule"] == "Linear" and schedule["keep_ratio"] == pytest.approx(0.3) and schedule["step"] == 8
    assert (tuned / "final" / "tokenizer.json").is_file()


def test_what_is_left_says_what_it_was_trained_with(tuned: Path, tiny_backbone: Path) -> None:
    said = json.loads((tuned / "final" / "training.json").read_text())
    assert said["dropping"]["init_args"]["recent"] == 8 and said["schedule"]["init_args"] == {"start": 0.9, "end": 0.3}
    assert said["settings"]["rank"] == 4 and said["data"]["tokens"] and said["steps"] == 8
    assert json.loads((tuned / "final" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_backbone
    )


def test_a_run_killed_between_its_last_step_and_the_export_exports_when_it_goes_on(
    tuned: Path, tmp_path: Path, tiny_backbone: Path, texts: Path
) -> None:
    run = write_config(tmp_path / "run.yaml", config(tmp_path, tiny_backbone, texts))
    run_cli("fit", "-c", run, "--ckpt_path", tuned / "checkpoints/step=8.ckpt")
    assert all(torch.equal(weights(tmp_path)[name], weight) for name, weight in weights(tuned).items())
    for name in ("schedule.json", "training.json"):
        assert (tmp_path / "final" / name).read_text() == (tuned / "final" / name).read_text()
