"""Overlays in configs/: what each changes of its base."""

from pathlib import Path
from typing import Any

import pytest

from tests.configs import CONFIGS, OBJECTIVES, files_of, flat, load, merged, name_of

OVERLAYS = [path for path in CONFIGS if len(files_of(path)) > 1 and path not in OBJECTIVES]
LARGE_RUN = {
    "trainer.max_steps": 1250,
    "trainer.accumulate_grad_batches": 8,
    "trainer.val_check_interval": 1000,
    "trainer.callbacks.ModelCheckpoint.every_n_train_steps": 500,
    "model.dtype": "bfloat16",
    "model.learning_rate": 0.0002,
    "data.window": 2048,
    "data.windows.train": 10000,
    "data.windows.validation": 32,
    "data.sources": [{"name": "fineweb_edu", "weight": 1, "origins": ["local", "hub"]}],
}
DISTILLED_ELSEWHERE = {
    "trainer.val_check_interval": 125,
    "trainer.callbacks.GateExport.dtype": "float32",
    "trainer.callbacks.GateExport.name": None,
    "model.hidden": 64,
    "model.scored_tokens": 2048,
    "data.window": 4096,
    "data.windows.train": 500,
    "data.seed": 0,
    "data.sources": [
        {"name": "pg19", "weight": 0.5, "origins": ["local", "hub"]},
        {"name": "recall", "weight": 0.5, "origins": ["local", "hub"]},
    ],
}
MIX = [
    {"name": "pg19", "weight": 0.15, "origins": ["local", "hub"]},
    {"name": "recall", "weight": 0.1, "origins": ["local", "hub"]},
    {"name": "code", "weight": 0.12, "origins": ["local", "hub"]},
    {"name": "recall_code", "weight": 0.08, "origins": ["local", "hub"]},
    {"name": "chat", "weight": 0.12, "origins": ["local", "hub", "drawn"]},
    {"name": "recall_chat", "weight": 0.08, "origins": ["local", "hub", "drawn"]},
    {"name": "encyclopaedia", "weight": 0.1, "origins": ["local", "hub"]},
    {"name": "web", "weight": 0.1, "origins": ["local", "hub"]},
    {"name": "gsm8k", "weight": 0.05, "origins": ["local", "hub"]},
    {"name": "math500", "weight": 0.05, "origins": ["local", "hub"]},
    {"name": "lists", "weight": 0.05},
]
CHANGES: dict[str, dict[str, Any]] = {  # the folders of the run aside
    "eviction_tuning/plain": {
        "model.dropping": "NoDropping",
        "model.schedule": "Fixed",
        "model.schedule.ratio": 1.0,
        "model.kl_weight": 0.0,
    },
    "eviction_tuning/random": {
        "model.dropping.recent": 32,
        "model.dropping.punctuation": False,
        "model.schedule.end": 0.074,
    },
    "eviction_tuning/window": {
        "model.dropping": "WindowDropping",
        "model.dropping.window": 76,
        "model.schedule": "Fixed",
        "model.schedule.ratio": 1.0,
    },
    "eviction_tuning/gates": {
        "model.dropping": "GateDropping",
        "model.dropping.gates": "smollm2-135m-instruct",
        "model.dropping.footprint": 0.125,
        "model.dropping.temperature": None,
        "model.dropping.train": False,
        "model.schedule": "Fixed",
        "model.schedule.ratio": 1.0,
    },
    "eviction_tuning/qwen2.5-0.5b": LARGE_RUN | {f"{part}.backbone": "Qwen/Qwen2.5-0.5B" for part in ("model", "data")},
    "eviction_tuning/qwen3-8b": LARGE_RUN
    | {f"{part}.backbone": "Qwen/Qwen3-8B" for part in ("model", "data")}
    | {"model.gradient_checkpointing": True},
    "eviction_tuning/llama-3.1-8b": LARGE_RUN
    | {f"{part}.backbone": "meta-llama/Llama-3.1-8B" for part in ("model", "data")}
    | {"model.gradient_checkpointing": True},
    "gates/lifespans/books": {},
    "gates/lifespans/books-post-rope": {"data.inputs": "keys_post_rope"},
    "gates/lifespans/qwen2.5-0.5b": {},
    "gates/lifespans/qwen2.5-coder-0.5b": {
        "trainer.max_epochs": 40,
        "trainer.callbacks.EarlyStopping.patience": 8,
        "model.hidden": 128,
    },
    "gates/lifespans/qwen3-0.6b": {},
    "gates/distilled/lists": {
        "trainer.log_every_n_steps": 5,
        "trainer.val_check_interval": 32,
        "trainer.callbacks.GateExport.name": "lists",
        "model.gates": "smollm2-135m-instruct-books",
        "model.temperature": 0.25,
        "model.learning_rate": 0.001,
        "data.windows.train": 64,
        "data.sources": [
            {"name": "pg19", "weight": 2, "origins": ["local", "hub"]},
            {"name": "recall", "weight": 1, "origins": ["local", "hub"]},
            {"name": "lists", "weight": 1},
        ],
    },
    "gates/distilled/mixed": {
        "trainer.val_check_interval": 100,
        "trainer.callbacks.GateExport.name": "smollm2-135m-instruct",
        "model.gates": "smollm2-135m-instruct-books",
        "model.temperature": 0.3,
        "model.learning_rate": 0.0015,
        "model.calibration_windows": 8,
        "data.windows.train": 400,
        "data.sources": MIX,
    },
    "gates/distilled/qwen2.5-0.5b": DISTILLED_ELSEWHERE
    | {f"{part}.backbone": "Qwen/Qwen2.5-0.5B" for part in ("model", "data")},
    "gates/distilled/qwen2.5-coder-0.5b": {
        "trainer.val_check_interval": 100,
        "trainer.callbacks.GateExport.name": "qwen2.5-coder-0.5b-instruct",
        "model.backbone": "qwen2.5-coder-0.5b",
        "model.scored_tokens": 256,
        "model.calibration_windows": 8,
        "data.backbone": "qwen2.5-coder-0.5b",
        "data.windows.train": 400,
        "data.sources": MIX,
    },
    "gates/distilled/qwen3-0.6b": DISTILLED_ELSEWHERE
    | {f"{part}.backbone": "Qwen/Qwen3-0.6B" for part in ("model", "data")},
}


def test_every_overlay_is_in_the_table() -> None:
    assert {name_of(path) for path in OVERLAYS} == set(CHANGES)


@pytest.mark.parametrize("path", OVERLAYS, ids=name_of)
def test_an_overlay_changes_its_folders_and_what_the_table_says(path: Path) -> None:
    base, config = flat(load(files_of(path)[0])), flat(merged(path))
    changes = {key: value for key, value in config.items() if key not in base or base[key] != value}
    folders = {key for key, value in changes.items() if str(value).startswith("runs/")}
    assert {key: value for key, value in changes.items() if key not in folders} == CHANGES[name_of(path)]
    assert "out" in folders
