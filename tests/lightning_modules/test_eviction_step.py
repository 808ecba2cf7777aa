"""One step of eviction tuning against plain loops over a model loaded anew; and what LoRA adds to real models."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from datamodules.token_windows import WindowBatch
from lightning_modules.eviction_tuning import EvictionTuning
from smartkv import load_backbone
from smartkv.models.backbone import Backbone
from smartkv.sparsity import Linear
from smartkv.sparsity.dropping import WindowDropping
from smartkv.sparsity.key_dropout import Seen
from tests.configs import merged
from tests.lightning_fixtures import ROOT
from tests.models import token_ids

TOKENS, WINDOW, SINKS, PRICE = 40, 12, 2, 1.7
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Noted(WindowDropping):
    """A window that says what it was asked for, and has a price, as gates that learn have."""

    def __init__(self) -> None:
        super().__init__(WINDOW, SINKS)
        self.ratios: list[float] = []

    def price(self) -> float:
        return PRICE

    def inside(
        self, lm: Backbone, ids: Tensor, keep_ratio: float, seeds: Sequence[int]
    ) -> AbstractContextManager[Seen]:
        self.ratios.append(keep_ratio)
        return super().inside(lm, ids, keep_ratio, seeds)


def module_at(backbone: Path, dtype: str = "float32", **settings: Any) -> tuple[EvictionTuning, dict[str, float]]:
    """At step 3 of 9, its adapters moved away from nothing; and what it logs."""
    module = EvictionTuning(Noted(), Linear(), str(backbone), dtype, rank=4, alpha=8, threads=1, **settings)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module._trainer = SimpleNamespace(strategy=strategy, world_size=2, global_step=3, state=SimpleNamespace(fn="fit"))
    module.configure_model()
    module.steps, logged = 9, {}
    module.log_dict = lambda figures, **_: logged.update(figures)
    module.log = lambda name, figure, **_: logged.update({name: float(figure)})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module, logged


def naive(backbone: Path, module: EvictionTuning, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parts of the loss, in float32 and by the definitions, from two models of their own; and its gradients."""
    teacher = load_backbone(str(backbone), "float32").model
    student = get_peft_model(
        load_backbone(str(backbone), "float32").model,
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    student.load_state_dict(dict(module.student.named_parameters()), strict=False)
    student.get_base_model().set_attn_implementation("eager")
    mask = torch.zeros(1, 1, TOKENS, TOKENS)
    seen = 0
    for query in range(TOKENS):
        for key in range(TOKENS):
            if key > query or (query - key >= WINDOW and key >= SINKS):
                mask[0, 0, query, key] = torch.finfo(torch.float32).min
            elif query >= TOKENS // 4:
                seen += 1
    with torch.no_grad():
        theirs = teacher(ids, output_hidden_states=True)
    ours = student(input_ids=ids, attention_mask=mask.expand(len(ids), -1, -1, -1), output_hidden_states=True)
    ce = kl = 0.0
    for row in range(len(ids)):
        for token in range(TOKENS - 1):
            mine, other = (out.logits[row, token].log_softmax(dim=-1) for out in (ours, theirs))
            ce = ce - mine[ids[row, token + 1]]
            kl = kl + (mine.exp() * (mine - other)).sum()
    count = len(ids) * (TOKENS - 1)
    mine, other = (out.hidden_states[-1][:, :-1] for out in (ours, theirs))
    parts = {"ce": ce / count, "kl": kl / count, "hidden": F.mse_loss(mine, other) / other.square().mean()}
    parts["footprint"] = torch.tensor(seen / sum(query + 1 for query in range(TOKENS // 4, TOKENS)))
    h = module.hparams
    total = h.ce_weight * parts["ce"] + h.kl_weight * parts["kl"] + h.hidden_weight * parts["hidden"]
    (total * 2 * len(ids) / 8).backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None and "lora_" in name}
    return parts, gradients


@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.0), (0.5, 2.0, 0.3), (1.0, 0.0, 0.0)])
def test_a_step_is_what_the_definitions_say(weights: tuple[float, float, float], tiny_backbone: Path) -> None:
    settings = dict(zip(("ce_weight", "kl_weight", "hidden_weight"), weights, strict=True))
    module, logged = module_at(tiny_backbone, **settings)
    ids = torch.stack([token_ids(TOKENS, seed) for seed in (0, 1)])
    loss = module.training_step(WindowBatch(ids, torch.tensor([0, 1]), global_windows=8), 0)
    loss.backward()
    module.on_after_backward()
    parts, gradients = naive(tiny_backbone, module, ids)
    expected = sum(weight * float(parts[name]) for weight, name in zip(weights, ("ce", "kl", "hidden"), strict=True))
    expected += PRICE * float(parts["footprint"])
    assert float(loss) == pytest.approx(expected * 2 * 2 / 8, rel=1e-4)  # of 8 windows this process of 2 has 2
    assert logged["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert logged["train_ce"] == pytest.approx(float(parts["ce"]), rel=1e-4)
    assert logged["train_kl"] == pytest.approx(float(parts["kl"]) if weights[1] else 0.0, rel=1e-3)
    assert logged["train_footprint"] == pytest.approx(float(parts["footprint"]))
    assert module.dropping.ratios == [logged["keep_ratio"]] == [pytest.approx(0.9 - 0.6 * 3 / 8)]
    found = {name.removeprefix("student."): p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert found.keys() == gradients.keys() and len(found) == 2 * 2 * len(TARGETS)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_a_step_in_bfloat16_is_near_one_in_float32(tiny_backbone: Path) -> None:
    ids = token_ids(TOKENS)[None]
    figures = []
    for dtype in ("float32", "bfloat16"):
        module, logged = module_at(tiny_backbone, dtype)
        module.training_step(WindowBatch(ids, torch.tensor([0]), global_windows=1), 0).backward()
        module.on_after_backward()
        trained = [p for p in module.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in trained)
        figures.append((logged["train_loss"], torch.cat([p.grad.flatten() for p in trained])))
    (loss, gradient), (near, rough) = figures
    assert near == pytest.approx(loss, rel=0.02)
    assert float(F.cosine_similarity(gradient, rough, dim=0)) > 0.95


SHAPES = {
    "smollm2": (
        LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
        ), 0.1345, 0.055,
    ),
    "qwen2.5-0.5b": (
        Qwen2Config(
            vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True,
        ), 0.494, 0.0175,
    ),
    "qwen3-8b": (
        Qwen3Config(
            vocab_size=151_936, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
        ), 8.19, 0.0075,
    ),
    "llama-3.1-8b": (
        LlamaConfig(
            vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
        ), 8.03, 0.0068,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_configs_adapters_have_as_many_parameters_as_the_shapes_say(name: str) -> None:
    shape, billions, share = SHAPES[name]
    file = "base" if name == "smollm2" else name
    settings = merged(ROOT / f"configs/eviction_tuning/{file}.yaml")["model"]["init_args"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
        total = sum(p.numel() for p in model.parameters())
        lora = LoraConfig(r=settings["rank"], target_modules=settings["targets"], task_type="CAUSAL_LM")
        student = get_peft_model(model, lora)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert total / 1e9 == pytest.approx(billions, rel=0.01)
    assert trained / total == pytest.approx(share, rel=0.05)
