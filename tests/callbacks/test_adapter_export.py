"""The exported adapter: plain peft reads it, it says how it was trained, and a killed run still leaves it."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from callbacks.adapter_export import merge
from smartkv.errors import SmartKVError
from tests.lightning_fixtures import run_cli, write_config
from tests.models import FAMILIES, save_tiny_backbone, token_ids
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


# -- tied weights -----------------------------------------------------------------------------------------------------

TIED = [("llama", "embed_tokens"), ("qwen2", "embed_tokens"), ("gpt2", "wte")]


def with_random_adapter(family: str, *targets: str) -> PeftModel:
    torch.manual_seed(0)
    model = FAMILIES[family](tie_word_embeddings=True)
    student = get_peft_model(model, LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return student


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "target"), TIED)
def test_a_tied_embedding_is_untied_where_an_adapter_changes_it_alone(family: str, target: str, tmp_path: Path) -> None:
    student, ids = with_random_adapter(family, target), token_ids(20)
    with torch.inference_mode():
        expected = student(ids[None]).logits
        merge(student, ids).save_pretrained(tmp_path)
        found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        torch.testing.assert_close(found(ids[None]).logits, expected, rtol=1e-4, atol=1e-4)
    assert not found.config.tie_word_embeddings


def test_tied_weights_that_no_adapter_changes_stay_tied(tmp_path: Path) -> None:
    merged = merge(with_random_adapter("llama", "q_proj"), token_ids(20))
    assert merged.config.tie_word_embeddings and merged.lm_head.weight is merged.model.embed_tokens.weight


def test_a_merged_model_with_other_logits_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    student = with_random_adapter("llama", "q_proj")
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)  # forgets the adapter
    with pytest.raises(SmartKVError, match="the merged model is not written: its logits are up to"):
        merge(student, token_ids(20))


@pytest.mark.filterwarnings("ignore")
def test_a_run_on_a_tied_embedding_leaves_a_merged_model_that_is_the_adapter_s(texts: Path, tmp_path: Path) -> None:
    backbone = save_tiny_backbone(tmp_path / "tied", max_positions=512, tie_word_embeddings=True)
    changes = {"model": {"targets": ["embed_tokens", "q_proj"]}, "trainer": {"max_epochs": 1}}
    run_cli("fit", "-c", write_config(tmp_path / "run.yaml", config(tmp_path, backbone, texts, **changes)))
    ids = token_ids(40)[None]
    with torch.inference_mode():
        base = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "final").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final/merged", dtype=torch.float32)(ids).logits
    assert torch.allclose(adapted, merged, atol=1e-4) and not torch.allclose(adapted, plain, atol=1e-2)
