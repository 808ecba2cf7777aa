"""What the tests of the Lightning part share: made texts, small runs of the real CLI, and callbacks that look on."""

import csv
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import Tensor

import main
from callbacks import ShardWriter
from datamodules.documents import DocumentWindows
from datamodules.lifespan_shards import LifespanShards
from lightning_modules import Harvest, LifespanGates
from smartkv.labels.lifespans import LabelSpec
from smartkv.models.architecture import Fingerprint
from smartkv.shards.manifest import SPLITS, Manifest, ShardEntry, shard_entry, shard_header
from smartkv.shards.shard_file import write_shard
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import WindowCounts

ROOT = Path(__file__).parents[1]
WINDOW, FOLLOW_UP, SINKS = 64, 32, 4
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
STEPS_AN_EPOCH = 10  # of `fit` on 7 windows: each gives blocks of 8, 8, 8 and 4 keys, 3 blocks a step
SENTENCE = "the river ran down to an old mill where nobody had lived since winter and yet a lamp burned in its window"
WORDS = SENTENCE.split()


def prose(characters: int, seed: int) -> str:
    """Made text of that many characters; another for each seed."""
    chosen = random.Random(seed).choices(WORDS, k=characters // 2)
    return " ".join(chosen)[:characters]


def write_texts(folder: Path, splits: Sequence[str] = ("train", "validation"), files: int = 3) -> Path:
    """A folder of the user's own: `files` texts of 600 characters in each split's subfolder."""
    for number, split in enumerate(splits):
        for file in range(files):
            path = folder / split / f"{split}{file}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(prose(600, seed=100 * number + file))
    return folder


def run_cli(*args: str | Path) -> None:
    """`python main.py …` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py"])  # or Lightning warns of pytest's own arguments
        main.main([str(arg) for arg in args])


def run_command(*args: str | Path, launcher: Sequence[str] = ()) -> str:
    """`python main.py …` in a process of its own, one thread each, with a free port for a group of processes.
    `launcher`: what stands between the two, such as `-m torch.distributed.run` and its options. Returns its stderr."""
    command = [sys.executable, *launcher, "main.py", *(str(arg) for arg in args)]
    kept = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "LOCAL_RANK")}
    environment = kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def refused(capsys: pytest.CaptureFixture[str], *args: str | Path, status: int | None = 2) -> str:
    """Run the CLI, which must stop with that exit status (None: any but 0) and no traceback; return its stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_cli(*args)
    output = capsys.readouterr().err
    assert stop.value.code == status if status is not None else stop.value.code not in (0, None)
    assert "Traceback" not in output
    return output


def error_line(output: str) -> str:
    """Return the one error line of what was printed."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    assert output.rstrip().endswith(lines[0]), "something was printed after the error"
    return lines[0]


# -- harvest ----------------------------------------------------------------------------------------------------------


def harvest_config(
    out: Path,
    backbone: Path,
    texts: Path,
    windows: dict[str, int] | None = None,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A harvest of a few windows of 64 tokens. `model`, `data`, `trainer`: other settings."""
    labels = {"thresholds": [0.02, 0.05], "ages": [8], "follow_up": FOLLOW_UP, "sinks": SINKS, "threads": 1}
    counts = windows or {"train": 7, "validation": 3}
    sources = [{"name": "mine", "path": str(texts)}]
    cuts = {"window": WINDOW, "windows": counts, "windows_per_shard": 2, "sources": sources}
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": str(out.parent / f"{out.name}-root"),
            "callbacks": [{"class_path": "ShardWriter"}],
            **(trainer or {}),
        },
        "model": {
            "class_path": "Harvest",
            "init_args": {"backbone": str(backbone), "dtype": "float32", **labels, **(model or {})},
        },
        "data": {
            "class_path": "DocumentWindows",
            "init_args": {"out": str(out), "backbone": str(backbone), **cuts, **(data or {})},
        },
        "return_predictions": False,
    }


def harvest_config_at(out: Path, backbone: Path, texts: Path, **settings: Any) -> Path:
    """The same as a file beside `out`."""
    return write_config(out.with_name(f"{out.name}.yaml"), harvest_config(out, backbone, texts, **settings))


def harvest(out: Path, backbone: Path, texts: Path, **settings: Any) -> Path:
    """Run the real harvest in this process; `out`."""
    run_cli("predict", "-c", harvest_config_at(out, backbone, texts, **settings))
    return out


def harvest_by_trainer(out: Path, backbone: Path, texts: Path, **settings: Any) -> Path:
    """The same without the command line: a mistake raises instead of ending the process."""
    config = harvest_config(out, backbone, texts, **settings)
    data = dict(config["data"]["init_args"])
    data["sources"] = [SourceConfig(**source) for source in data["sources"]]
    data["windows"] = WindowCounts(**data["windows"])
    trainer = L.Trainer(**config["trainer"] | {"callbacks": [ShardWriter()]})
    model = Harvest(**config["model"]["init_args"])
    trainer.predict(model, datamodule=DocumentWindows(**data), return_predictions=False)
    return out


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """Content of every shard and of the plan, by file name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


# -- gates ------------------------------------------------------------------------------------------------------------


def gates_config(
    shards: Path,
    root: Path,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    callbacks: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """A fit of two epochs that leaves `root`/metrics.csv. `callbacks`: {"class_path", "init_args"} of each."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(root), "name": "", "version": ""}}
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(root),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(c["class_path"] == "ModelCheckpoint" for c in callbacks),
            "logger": logger,
            "callbacks": list(callbacks),
            **(trainer or {}),
        },
        "model": {"class_path": "LifespanGates", "init_args": {"hidden": 8, "warmup_steps": 2, **(model or {})}},
        "data": {
            "class_path": "LifespanShards",
            "init_args": {"shards": str(shards), "batch_size": 24, "block": 8, **(data or {})},
        },
    }


def logged(root: Path) -> list[dict[str, float]]:
    """metrics.csv: what was logged at each step, without what was not."""
    with (root / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def last_logged(root: Path) -> dict[str, float]:
    """The last value of each figure."""
    return {name: value for row in logged(root) for name, value in row.items()}


WATCHER = {"class_path": "tests.lightning_fixtures.Watcher"}


class Watcher(L.Callback):
    """Looks on at a real fit. `Watcher.last` is the one of the latest run.

    Attributes:
        module, datamodule: of the fit.
        start: the gates' weights before the first step.
        gradients: of the first step, by parameter.
        predictions: of all validation keys after each validation, `[gates, rows]`.
        steps: optimiser steps done at each validation.
    """

    last: "Watcher"

    def __init__(self) -> None:
        Watcher.last = self
        self.start: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.predictions: list[Tensor] = []
        self.steps: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.module, self.datamodule = pl_module, trainer.datamodule
        self.start = weights(pl_module)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.gradients:
            self.gradients = {name: p.grad.clone() for name, p in pl_module.bank.named_parameters()}

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.predictions.append(pl_module(validation_keys(trainer.datamodule).to(pl_module.device)).cpu())
        self.steps.append(trainer.global_step)


def weights(module: L.LightningModule) -> dict[str, Tensor]:
    """A copy of the gates' weights."""
    return {name: tensor.detach().clone() for name, tensor in module.bank.state_dict().items()}


def fit(shards: Path, root: Path, **settings: Any) -> Watcher:
    """Run the real fit in this process, looked on at."""
    settings["callbacks"] = [*settings.get("callbacks", ()), WATCHER]
    config = write_config(root.with_name(f"{root.name}-fit.yaml"), gates_config(shards, root, **settings))
    run_cli("fit", "-c", config)
    return Watcher.last


def fit_by_trainer(shards: Path, root: Path, **settings: Any) -> Watcher:
    """The same without the command line, which takes longer to read a config than these fits take to run."""
    config = gates_config(shards, root, **settings)
    L.seed_everything(config["seed_everything"])
    logger = CSVLogger(**config["trainer"]["logger"]["init_args"])
    trainer = L.Trainer(**config["trainer"] | {"callbacks": [Watcher()], "logger": logger})
    trainer.fit(LifespanGates(**config["model"]["init_args"]), datamodule=LifespanShards(**config["data"]["init_args"]))
    return Watcher.last


def validation_keys(datamodule: L.LightningDataModule) -> Tensor:
    """float16 `[gates, rows, head_dim]`."""
    rows = datamodule.rows
    return rows.keys(*rows.blocks("validation"))


def labelled(folder: Path, split: str, threshold: float = 0.05, keys: str = "keys") -> dict[str, Tensor]:
    """All labelled rows of a split, straight from the files and the definitions: `keys` `[gates, rows, head_dim]`,
    `target` `[gates, rows]`, `position` and `token` `[rows]`."""
    manifest = Manifest.read(folder)
    row, follow_up = manifest.spec.thresholds.index(threshold), manifest.spec.follow_up
    found: dict[str, list[Tensor]] = {"keys": [], "target": [], "position": [], "token": []}
    for entry in manifest.of_split(split):
        shard = load_file(folder / entry.file)
        chosen = (shard["horizon"] >= follow_up) & (shard["position"] >= manifest.sinks)
        lifespan = shard["lifespan"][row][:, :, chosen].flatten(0, 1)
        found["keys"].append(shard[keys][:, :, chosen].flatten(0, 1))
        found["target"].append(lifespan.clamp(max=follow_up).double().log().div(torch.tensor(4.0).double().log()))
        found["position"].append(shard["position"][chosen])
        found["token"].append(shard["token"][chosen])
    dims = {"keys": 1, "target": 1, "position": 0, "token": 0}
    return {name: torch.cat(parts, dim=dims[name]) for name, parts in found.items()}


def write_made_shards(
    folder: Path,
    targets: dict[str, list[Tensor]],
    keys: dict[str, list[Tensor]],
    sinks: int = SINKS,
    rotated: dict[str, list[Tensor]] | None = None,
    fingerprint: Fingerprint | None = None,
) -> Path:
    """Shards of made keys and lifespans, one a window.

    Args:
        targets: lifespans in tokens `[layers, kv_heads, tokens]` of each window of each split.
        keys: `[layers, kv_heads, tokens, head_dim]` of each window of each split.
        rotated: the same for keys_post_rope.
    """
    entries: list[ShardEntry] = []
    generator = torch.Generator().manual_seed(7)
    layers, kv_heads, window, head_dim = keys["train"][0].shape
    fingerprint = fingerprint or Fingerprint("llama", layers, kv_heads, head_dim, "0123456789abcdef")
    spec = LabelSpec((0.05,), (), FOLLOW_UP)
    for split, windows in targets.items():
        for number, lifespan in enumerate(windows):
            tokens = lifespan.shape[-1]
            tensors = {
                "keys": keys[split][number].half(),
                "lifespan": lifespan.int()[None],
                "horizon": torch.arange(tokens - 1, -1, -1, dtype=torch.int32),
                "position": torch.arange(tokens, dtype=torch.int32),
                "token": torch.randint(40, (tokens,), generator=generator).int(),
                "document": torch.full((tokens,), len(entries), dtype=torch.int32),
                "split": torch.full((tokens,), SPLITS.index(split), dtype=torch.int32),
            }
            if rotated:
                tensors["keys_post_rope"] = rotated[split][number].half()
            path = folder / f"{split}-{number:05d}.safetensors"
            write_shard(path, tensors, shard_header(fingerprint, spec, window, sinks))
            entries.append(shard_entry(path, split, 1, tokens))
    documents = [f"made/{number}" for number in range(len(entries))]
    Manifest(folder, fingerprint, spec, window, sinks, [], documents, {"backbone": "made"}, entries).write()
    return folder


def made_keys(windows: int, tokens: int, seed: int, layers: int = 1, kv_heads: int = 2, dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(layers, kv_heads, tokens, dim, generator=generator).half() for _ in range(windows)]


def lifespan_of(keys: Tensor, sign: float = 1.0) -> Tensor:
    """A lifespan that the key decides: between 1 and the follow-up, by the sigmoid of its first number."""
    share = torch.sigmoid(2 * sign * keys[..., 0].float())
    return FOLLOW_UP**share
