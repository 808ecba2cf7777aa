"""Figures of whole models: what the ways of one figure have in common."""

from unittest.mock import patch

import pytest
import torch

from eval.gpu import whole_model
from eval.gpu.shapes import TINY, build, keys_bytes
from eval.gpu.whole_model import STEPS, decode_steps, enough_memory, memory_of_an_answer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build(TINY["tiny Qwen2"], CPU, torch.float32, 600)


def test_all_ways_decode_so_many_tokens(model: torch.nn.Module) -> None:
    seen: list[int] = []
    with torch.inference_mode(), patch.object(whole_model, "seconds", lambda call, *_: (call(), 1.0)[1]):
        hook = model.register_forward_hook(lambda *_: seen.append(1))
        rows = list(decode_steps(model, 2, 128, 0.25))
        hook.remove()
    assert [row["way"] for row in rows] == ["SmartKV", "SmartKV, budget", "static", "dynamic"]
    assert len(seen) == 4 * STEPS
    assert [row["bytes"] for row in rows[2:]] == [keys_bytes(model, 2, 128)] * 2
    assert all(row["eager_ms"] == 1e3 / STEPS for row in rows)


def test_a_long_answer_holds_its_budget(model: torch.nn.Module) -> None:
    with torch.inference_mode():
        figures = memory_of_an_answer(model, 2, 128, 150)
    assert figures["way"] == "150 steps" and figures["held"] <= 32 + 64 and figures["storage_bytes"] > 0


def test_the_memory_of_a_cpu_is_not_looked_at(model: torch.nn.Module) -> None:
    assert enough_memory(model, 10**9, 10**9)
