"""Token windows of documents, the input of the harvest.

`plan_windows` chooses all windows before the harvest starts. The plan is saved beside the shards, so that every process
and every later run works on the same windows.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from datamodules.distributed import process_of
from datamodules.shard_plan import WindowRun, WindowRuns, shard_runs
from smartkv.errors import SmartKVError
from smartkv.io.checks import differences
from smartkv.models.backbone import load_tokenizer, read_architecture
from smartkv.models.gguf import PACKAGED
from smartkv.shards.manifest import MANIFEST, ShardEntry, recorded_shards, shard_entry
from smartkv.shards.shard_file import DamagedFile, digests, open_tensors, read_header, write_shard
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import PLAN, WindowCounts, WindowPlan, plan_windows, read_plan

MISSING, DAMAGED = "missing", "damaged"
OTHER_WINDOWS = "of other windows than planned"
NO_DIGEST = "of an earlier version, in no manifest, and without a digest to be checked by"


class DocumentWindows(L.LightningDataModule):
    """Windows of a weighted mix of texts, for `predict`.

    Args:
        out: folder for the plan and the shards. Null: the folder of the run, which main.py knows.
        sources: mix of texts.
        windows: windows to harvest per split.
        backbone: hub id, local folder, .gguf file or smollm2-135m; only its tokenizer is used.
        window: tokens per window.
        windows_per_document: most windows from one document, unless its source has too few documents.
        windows_per_shard: windows per shard; a killed run loses at most this many per process.
        seed: seed of the choice and the order of windows.
        trust_remote_code: run code that comes with the tokenizer.

    Attributes:
        overwrite: replace what another harvest left in `out`.

    Raises:
        SmartKVError: there is no `out`.
    """

    trainer: Any  # None without a run

    def __init__(
        self,
        out: str | None = None,
        *,
        sources: list[SourceConfig],
        windows: WindowCounts,
        backbone: str = PACKAGED,
        window: int = 2048,
        windows_per_document: int = 4,
        windows_per_shard: int = 2,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if out is None:
            raise SmartKVError("there is no folder for the shards: give one with --out")
        self.out, self.backbone, self.sources, self.counts = Path(out), backbone, sources, asdict(windows)
        self.window, self.windows_per_document = window, windows_per_document
        self.windows_per_shard, self.seed, self.trust_remote_code = windows_per_shard, seed, trust_remote_code
        self.allow_zero_length_dataloader_with_multiple_devices = True  # there may be fewer shards than processes
        self.overwrite = False
        self.plan: WindowPlan = None  # type: ignore[assignment] # until setup
        self.runs: list[WindowRun] = []
        self.faults: dict[str, str] = {}  # reason for making each shard, by file
        self.entries: dict[str, ShardEntry] = {}  # entries confirmed by an earlier manifest, by file

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that decide which windows are chosen."""
        names = ("backbone", "counts", "window", "windows_per_document", "windows_per_shard", "seed")
        return {name: getattr(self, name) for name in names} | {"sources": [asdict(s) for s in self.sources]}

    @property
    def _leaves_nothing(self) -> bool:
        """Whether this is a `fast_dev_run`, which neither reads nor writes `out`."""
        return self.trainer is not None and bool(self.trainer.fast_dev_run)

    def prepare_data(self) -> None:
        """Plan the windows and save the plan, unless the folder has the same one already.

        Raises:
            SmartKVError: an argument is out of range, or the folder holds shards of other windows.
        """
        if self._leaves_nothing:
            return
        path = self.out / PLAN
        old = [self.out / MANIFEST, *self.out.glob("*-*.safetensors")] if self.overwrite else []
        if path.exists() and not self.overwrite and (saved := _arguments_of(path)) is not None:
            if saved == self.arguments:
                return
            if any(self.out.glob("*-*.safetensors")):  # a plan without shards may be replaced
                changed = sorted(k for k in self.arguments if saved.get(k) != self.arguments[k])
                raise SmartKVError(
                    f"{self.out} holds another harvest (it differs in {', '.join(changed)}): "
                    "give another 'out', or replace it with --overwrite"
                )
        plan = self._planned()
        if old and self.trainer is not None:
            self.trainer.lightning_module.make_ready()  # no mistake in its settings costs the old shards
        for file in old:
            file.unlink(missing_ok=True)
        header = {"arguments": self.arguments, "documents": plan.documents, "sources": plan.sources}
        write_shard(path, {"tokens": plan.tokens, "document": plan.document, "split": plan.split}, header)

    def _planned(self) -> WindowPlan:
        """Choose the windows of all splits."""
        if self.windows_per_shard < 1:
            raise SmartKVError(f"windows_per_shard must be at least 1, got {self.windows_per_shard}")
        limit = read_architecture(self.backbone, self.trust_remote_code).max_positions
        if self.window > limit:
            raise SmartKVError(f"window {self.window} is longer than the {limit} positions of '{self.backbone}'")
        tokenizer = load_tokenizer(self.backbone, self.trust_remote_code)
        return plan_windows(self.sources, self.counts, tokenizer, self.window, self.windows_per_document, self.seed)

    def setup(self, stage: str) -> None:
        """Read the plan and find the shards that are still to be made."""
        self.plan = self._planned() if self._leaves_nothing else read_plan(self.out)
        self.runs = shard_runs(self.plan, self.windows_per_shard)
        self.entries = {}
        # one process looks for all: another may already be writing when the last one looks
        faults = self._faults() if self.trainer is None or self.trainer.is_global_zero else {}
        self.faults = faults if self.trainer is None else self.trainer.strategy.broadcast(faults)
        self.todo = [run for run in self.runs if run.file in self.faults]

    def _faults(self) -> dict[str, str]:
        """Return the fault of each shard that is to be made, by file."""
        if self._leaves_nothing:
            return {run.file: MISSING for run in self.runs}
        recorded = recorded_shards(self.out)
        faults = {run.file: self._fault(run, recorded.get(run.file)) for run in WindowRuns(self.plan, self.runs)}
        return {file: fault for file, fault in faults.items() if fault is not None}

    def _fault(self, run: WindowRun, recorded: ShardEntry | None) -> str | None:
        """Return what is wrong with a shard's file, or None if it is intact and holds the planned windows.

        Args:
            run: the shard's planned windows.
            recorded: the shard's entry in an earlier manifest. It vouches for the content only: the manifest may list a
                shard of other windows.

        Raises:
            SmartKVError: the file is no shard, or cannot be read.
        """
        path = self.out / run.file
        if not path.exists():
            return MISSING
        entry = self.entry(run) if recorded else None
        vouched = entry is not None and recorded is not None and entry.sha256 == recorded.sha256
        try:
            if not vouched:
                recorded_digest, digest = digests(path)
                if recorded_digest != digest:
                    return DAMAGED if recorded_digest or recorded else NO_DIGEST
            with open_tensors(path) as file:
                names = set(file.keys())
                same = (n in names and torch.equal(file.get_tensor(n), t) for n, t in run.tensors().items())
                if not all(same):
                    return OTHER_WINDOWS
        except DamagedFile:
            return DAMAGED
        if vouched and entry is not None:
            self.entries[run.file] = entry
        return None

    def entry(self, run: WindowRun) -> ShardEntry:
        """Return the manifest's entry for a shard that exists."""
        return shard_entry(self.out / run.file, run.split, run.windows, run.windows * self.window)

    def check_shards(self, header: dict[str, Any]) -> None:
        """Check that the existing shards were made with this run's settings and model.

        Args:
            header: header of the shards that this run makes.

        Raises:
            SmartKVError: a shard's header differs; the message names the shard and the differing keys.
        """
        for run in self.runs:
            if run in self.todo:
                continue
            path = self.out / run.file
            written = {"sinks": header["sinks"]} | read_header(path)
            if changed := sorted(key for key in header if written.get(key) != header[key]):
                then, now = ({**each, **each.get("arguments", {}), "arguments": None} for each in (written, header))
                named = "; ".join(differences(then, now) or changed)
                raise SmartKVError(
                    f"{path} was harvested with other settings (it differs in {named}): "
                    "give another 'out', or replace it with --overwrite"
                )

    def clear_away(self) -> None:
        """Delete the faulty shards that this run makes again, and print their names.

        If they stayed, a run limited to a few batches would count them as made.
        """
        if self.trainer.is_global_zero:
            for fault in (DAMAGED, OTHER_WINDOWS, NO_DIGEST):
                files = [file for file, reason in self.faults.items() if reason == fault]
                for file in files:
                    (self.out / file).unlink(missing_ok=True)
                if files:
                    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
                    print(f"made again in {self.out}: {', '.join(files[:3])}{more} ({fault})")
        self.trainer.strategy.barrier("faulty shards are deleted")  # before another process writes new ones

    def predict_dataloader(self) -> WindowRuns:
        """Return this process's shards.

        They are divided here because the Trainer's sampler needs at least one shard per process.
        """
        rank, world_size = process_of(self.trainer)
        return WindowRuns(self.plan, self.todo[rank::world_size])


def _arguments_of(path: Path) -> dict[str, Any] | None:
    """Return the arguments of a saved plan; if it is damaged, print so and return None."""
    try:
        recorded, digest = digests(path)
        if recorded in (None, digest):
            return read_header(path)["arguments"]
    except DamagedFile:
        pass
    print(f"{path} is damaged: it is made again")
    return None
