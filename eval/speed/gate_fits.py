"""Trainings of gates on random keys, all gates together and one after another: what `python -m eval training` times.

Speed and memory do not depend on the values of keys. Nothing here needs more than a bare machine with lightning has.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.block_loader import KeyBatch
from datamodules.lifespan_shards import LifespanShards
from lightning_modules.gates import LifespanGates
from smartkv.labels.lifespans import LabelSpec
from smartkv.models.architecture import Fingerprint
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import SPLITS, Manifest, shard_entry, shard_header
from smartkv.shards.shard_file import write_shard

SINKS, HIDDEN = 4, 64
SIZES = {  # layers, KV heads, head_dim
    "Qwen2.5-0.5B": (24, 2, 64),
    "SmolLM2-135M": (30, 3, 64),
    "Qwen3-8B": (36, 8, 128),
    "70B class": (80, 8, 128),
}


def made_shards(folder: Path, layers: int, kv_heads: int, head_dim: int, window: int, windows: int) -> Path:
    """Write shards of random keys and lifespans, one window each, and one more for validation."""
    generator = torch.Generator().manual_seed(0)
    fingerprint, spec = Fingerprint("llama", layers, kv_heads, head_dim, "made"), LabelSpec((0.05,), (), window // 2)
    entries = []
    for number in range(windows + 1):
        split = "train" if number < windows else "validation"
        exponent = 5 * torch.rand(1, layers, kv_heads, window, generator=generator)
        tensors = {
            "keys": torch.randn(layers, kv_heads, window, head_dim, generator=generator).half(),
            "lifespan": (4**exponent).int(),
            "horizon": torch.arange(window - 1, -1, -1, dtype=torch.int32),
            "position": torch.arange(window, dtype=torch.int32),
            "token": torch.randint(1000, (window,), generator=generator).int(),
            "document": torch.full((window,), number, dtype=torch.int32),
            "split": torch.full((window,), SPLITS.index(split), dtype=torch.int32),
        }
        path = folder / f"{split}-{number:05d}.safetensors"
        write_shard(path, tensors, shard_header(fingerprint, spec, window, SINKS))
        entries.append(shard_entry(path, split, 1, window))
    documents = [f"made/{number}" for number in range(windows + 1)]
    Manifest(folder, fingerprint, spec, window, SINKS, [], documents, {"backbone": "made"}, entries).write()
    return folder


def write_shards(folder: Path, *sizes: int) -> dict[str, Any]:
    """Write shards (see `made_shards`), for a process whose memory is not measured; no figures."""
    made_shards(folder, *sizes)
    return {}


def fit_together(shards: Path, batch: int, steps: int, device: str) -> tuple[float, int]:
    """Train all gates for `steps` steps by Lightning, as `fit` does but without validation.

    Returns:
        Seconds, and the keys a head that the steps took.
    """
    warnings.filterwarnings("ignore")
    counted = _Counted()
    start = time.perf_counter()
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else device,
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[counted],
    )
    trainer.fit(LifespanGates(HIDDEN), datamodule=LifespanShards(str(shards), batch_size=batch, verify=False))
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, counted.rows


class _Counted(L.Callback):
    """Callback that counts the keys a head of all batches."""

    rows = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: KeyBatch, *_: Any) -> None:
        self.rows += batch.global_rows


def fit_apart(files: list[Path], batch: int, steps: int, device: str) -> float:
    """Train one head after another for the same steps, and return the seconds.

    Each head has a file of keys, an MLP and an optimiser of its own.
    """
    start = time.perf_counter()
    for file in files:
        content = torch.load(file, weights_only=True)
        keys, target = content["keys"].to(device), content["target"].to(device)
        wide = keys.float()
        mean, std = wide.mean(dim=0), wide.std(dim=0)
        gate = nn.Sequential(nn.Linear(keys.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)).to(device)
        optimizer = torch.optim.AdamW(gate.parameters(), lr=3e-3, weight_decay=0.01)
        order: list[Tensor] = []
        for _ in range(steps):
            order = order or list(torch.randperm(len(keys), device=device).split(min(batch, len(keys))))
            rows = order.pop()
            loss = F.huber_loss(gate((keys[rows].float() - mean) / std)[:, 0], target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def both_ways(
    folder: Path, batch: int, steps: int, rounds: int, window: int, windows: int, threads: int, device: str
) -> dict[str, Any]:
    """Train the gates of Qwen2.5-0.5B together and one after another, in turns.

    Args:
        folder: for shards and files, which are written first.
        batch: keys a head an optimiser step.
        steps: optimiser steps a round.
        rounds: of both ways.
        window, windows: tokens of a made window, and how many.
        threads: CPU threads.
        device: cpu or cuda.

    Returns:
        Seconds of both ways, medians and by round, their ratio, and rows a second.
    """
    torch.set_num_threads(threads)
    shards = made_shards(folder, *SIZES["Qwen2.5-0.5B"], window, windows)
    rows, used = LabelledKeys(Manifest.read(shards)), 0
    blocks = rows.blocks("train")
    keys, target = rows.keys(*blocks), rows.target(*blocks)
    files = [folder / f"head{gate}.pt" for gate in range(len(keys))]
    for gate, file in enumerate(files):
        torch.save({"keys": keys[gate].clone(), "target": target[gate].clone()}, file)
    torch.save({"keys": keys, "target": target}, folder / "all.pt")
    together, alone = [], []
    for _ in range(rounds):
        seconds, used = fit_together(shards, batch, steps, device)
        together.append(seconds)
        alone.append(fit_apart(files, batch, steps, device))
    ratios = [one_by_one / at_once for at_once, one_by_one in zip(together, alone, strict=True)]
    figures: dict[str, Any] = {
        "together": statistics.median(together),
        "apart": statistics.median(alone),
        "rows_a_step": used / steps,
    }
    figures["rounds"] = {"together": together, "apart": alone}
    figures |= {"ratio": statistics.median(ratios), "rows_trained": used / statistics.median(together)}
    data = LifespanShards(str(shards), batch_size=batch, verify=False)
    data.setup("validate")
    figures["rows_from_shards"] = _rows_a_second(lambda: sum(b.keys.shape[1] for b in data.train_dataloader()))
    whole = folder / "all.pt"
    figures["rows_from_torch_load"] = _rows_a_second(lambda: torch.load(whole, weights_only=True)["keys"].shape[1])
    return figures


def _rows_a_second(read: Callable[[], int], rounds: int = 3) -> float:
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        rates.append(read() / (time.perf_counter() - start))
    return statistics.median(rates)


def growth_of_heads(shards: Path, batch: int, steps: int, threads: int, device: str) -> dict[str, Any]:
    """Return steps a second of all gates of some shards, and on a GPU the memory that was allocated."""
    torch.set_num_threads(threads)
    seconds, rows = fit_together(shards, batch, steps, device)
    figures = {"steps_per_second": steps / seconds, "rows_a_step": rows / steps}
    figures["shard_bytes"] = sum(s.bytes for s in Manifest.read(shards).shards)
    return figures | ({"peak_memory": torch.cuda.max_memory_allocated()} if device == "cuda" else {})
