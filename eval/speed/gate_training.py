"""`python -m eval training`: speed and memory of gate training, all gates together and one by one.

The keys are random, since speed and memory do not depend on their values.
"""

import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.block_loader import KeyBatch
from datamodules.lifespan_shards import LifespanShards
from eval.common.console import make_console
from eval.common.isolated import run_isolated
from eval.common.results import machine, provenance, save_picture, write_result, write_tables
from eval.speed.training_report import table_of_heads, table_of_ways, training_picture
from lightning_modules.gates import LifespanGates
from smartkv.errors import SmartKVError
from smartkv.io.locks import lock_folder
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


def training(
    out: str,
    batches: list[int] = [1024, 4096],  # noqa: B006 - jsonargparse shows it; never changed
    models: list[str] = list(SIZES),  # noqa: B006
    steps: int = 100,
    rounds: int = 5,
    window: int = 1024,
    windows: int = 16,
    threads: int = 2,
    device: str = "cpu",
    markdown_file: str | None = None,
) -> None:
    """Measure the training of gates. Digests of shards are not checked (`verify: false`): `fit` does that once, before.

    Args:
        out: folder for training.json, training.md and the picture.
        batches: keys a head an optimiser step, for all gates together against one by one (24 × 2 heads).
        models: whose numbers of heads are measured: Qwen2.5-0.5B, SmolLM2-135M, Qwen3-8B, 70B class.
        steps: optimiser steps a round.
        rounds: of both ways in turn; the median is given.
        window: tokens of a made window, half of them labelled.
        windows: made windows to train on; fewer where heads are many, and two batches at least.
        threads: CPU threads.
        device: cpu or cuda.
        markdown_file: where the tables go besides. Null: nowhere.
    """
    console = make_console()
    lock_folder(out)  # before the measurement, so that a folder in use is an error at once
    if unknown := sorted(set(models) - set(SIZES)):
        raise SmartKVError(f"models {', '.join(unknown)} are unknown: expected some of {', '.join(SIZES)}")
    if min(steps, rounds, windows, threads, *batches) < 1 or window < 4 * SINKS or not batches:
        raise SmartKVError(
            f"steps, rounds, windows, threads and batches must be at least 1, window {4 * SINKS}, some batches given"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise SmartKVError("device 'cuda' cannot be used here: torch finds no GPU")
    ways, heads = [], []
    with tempfile.TemporaryDirectory() as scratch, Progress(console=console) as progress:
        task = progress.add_task("Training", total=len(batches) + len(models))
        for batch in batches:
            folder = Path(scratch) / f"{batch}"
            ways.append(
                {"batch": batch, **run_isolated(_ways, folder, batch, steps, rounds, window, windows, threads, device)}
            )
            progress.advance(task)
        for name in models:
            least = -(-2 * batches[0] // (window // 2 - SINKS))
            made = max(
                least, windows * 48 * 64 // math.prod(SIZES[name])
            )  # the same bytes for each model, or two batches
            shards = Path(scratch) / name
            run_isolated(_made, shards, *SIZES[name], window, made)
            measured = run_isolated(_heads, shards, batches[0], steps, threads, device)
            heads.append({"model": name, "heads": SIZES[name][0] * SIZES[name][1], **measured})
            progress.advance(task)
    arguments = {"batches": batches, "steps": steps, "rounds": rounds, "window": window, "windows": windows}
    arguments |= {"threads": threads, "device": device, "machine": machine(device)}
    tables = [table_of_ways(ways), table_of_heads(heads, batches[0])]
    figures = {"units": UNITS, "ways": ways, "heads": heads}
    result = write_result(Path(out), "training", arguments, figures)
    picture = save_picture(training_picture(ways, heads), Path(out) / "training.png")
    files = [Path(out) / "training.md", *([Path(markdown_file)] if markdown_file else [])]
    introduction = provenance("training", arguments)
    for table in tables:
        console.print(table)
    for path in [result, *(write_tables(file, tables, introduction) for file in files), picture]:
        console.print(f"  {path}", highlight=False)


UNITS = {
    "together, apart": "seconds for the same steps of all 48 heads, from files to trained gates, their keys' mean and "
    "deviation included; one by one: their keys from a file a head",
    "rounds": "the seconds of each round, of which these are the medians",
    "ratio": "one by one ÷ together, median of rounds",
    "rows_from_shards, rows_from_torch_load": "keys of all heads a second that can be read",
    "rows_trained": "keys of all heads a second that training takes",
    "rows_a_step": "keys a head of an optimiser step, mean: a batch is made of whole blocks",
    "peak_memory": "bytes, of the whole process that trains, what it read of its mapped shards among them; on a GPU "
    "what is allocated there",
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


def _made(folder: Path, *sizes: int) -> dict[str, Any]:
    """Write shards in a process whose memory is not measured."""
    made_shards(folder, *sizes)
    return {}


def _fit(shards: Path, batch: int, steps: int, device: str) -> tuple[float, int]:
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


def _apart(files: list[Path], batch: int, steps: int, device: str) -> float:
    """Return the seconds of the same steps for one head after another.

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


def _ways(
    folder: Path, batch: int, steps: int, rounds: int, window: int, windows: int, threads: int, device: str
) -> dict[str, Any]:
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
        seconds, used = _fit(shards, batch, steps, device)
        together.append(seconds)
        alone.append(_apart(files, batch, steps, device))
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


def _heads(shards: Path, batch: int, steps: int, threads: int, device: str) -> dict[str, Any]:
    torch.set_num_threads(threads)
    seconds, rows = _fit(shards, batch, steps, device)
    figures = {"steps_per_second": steps / seconds, "rows_a_step": rows / steps}
    figures["shard_bytes"] = sum(s.bytes for s in Manifest.read(shards).shards)
    return figures | ({"peak_memory": torch.cuda.max_memory_allocated()} if device == "cuda" else {})
