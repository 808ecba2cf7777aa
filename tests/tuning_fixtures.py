"""A small eviction tuning: its texts, its config, and the adapter that it leaves."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.lightning_fixtures import prose

TOKENS = 64


def write_long_texts(folder: Path) -> Path:
    """One text of 4,000 characters in each split's subfolder."""
    for split in ("train", "validation"):
        (folder / split).mkdir()
        (folder / split / f"{split}.txt").write_text(prose(4000, seed=len(split)))
    return folder


def config(out: Path, backbone: Path, texts: Path, **changes: Any) -> dict[str, Any]:
    model = {
        "backbone": str(backbone),
        "dtype": "float32",
        "rank": 4,
        "alpha": 8,
        "threads": 1,
        "learning_rate": 0.01,
        "dropping": {"class_path": "smartkv.sparsity.dropping.RandomDropping", "init_args": {"recent": 8}},
        "schedule": {"class_path": "smartkv.sparsity.Linear"},
    }
    data = {
        "sources": [{"name": "mine", "path": str(texts)}],
        "windows": {"train": 8, "validation": 2},
        "backbone": str(backbone),
        "window": TOKENS,
        "windows_per_document": 20,
        "batch_size": 2,
    }
    callbacks = [
        {
            "class_path": "ModelCheckpoint",
            "init_args": {
                "dirpath": str(out / "checkpoints"),
                "filename": "{step}",
                "every_n_train_steps": 2,
                "save_top_k": -1,
                "save_last": True,
            },
        },
        {"class_path": "AdapterExport", "init_args": {"out": str(out / "final"), "merged": True}},
    ]
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_progress_bar": False,
               "enable_model_summary": False, "num_sanity_val_steps": 0, "default_root_dir": str(out),
               "callbacks": callbacks, "log_every_n_steps": 1}  # fmt: skip
    return {
        "trainer": trainer | changes.get("trainer", {}),
        "model": {"class_path": "EvictionTuning", "init_args": model | changes.get("model", {})},
        "data": {"class_path": "TokenWindows", "init_args": data | changes.get("data", {})},
    }


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / "adapter_model.safetensors")
