"""Documents -> token windows: what the harvest reads.

`plan_windows` fixes, before anything runs, which windows there are; the plan is kept beside the shards, so that every
process and every later run works on the same ones.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from datamodules.distributed import process_of
from datamodules.shard_plan import WindowRun, WindowRuns, shard_runs
from smartkv.errors import SmartKVError
from smartkv.models.backbone import load_tokenizer, read_architecture
from smartkv.models.gguf import PACKAGED
from smartkv.shards.manifest import ShardEntry, recorded_shards, shard_entry
from smartkv.shards.shard_file import DamagedFile, digests, open_tensors, read_header, write_shard
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import PLAN, WindowCounts, WindowPlan, plan_windows, read_plan

MISSING, DAMAGED = "missing", "damaged"
OTHER_WINDOWS = "of other windows than planned"
NO_DIGEST = "of an earlier version, in no manifest, and without a digest to be checked by"


class DocumentWindows(L.LightningDataModule):
    """Windows of a weighted mix of texts, for `predict`.

    Args:
        out: folder for the plan and the shards.
        backbone: hub id, local folder, .gguf file or smollm2-135m; here its tokenizer is used.
        sources: the mix.
        windows: windows to harvest of each split.
        window: tokens a window.
        windows_per_document: most windows taken from one long document, unless its source runs out.
        windows_per_shard: windows a shard; what is lost at most, per process, when a run is killed.
        seed: of the choice and the order of windows.
        trust_remote_code: run code that comes with the tokenizer.
    """

    def __init__(
        self,
        out: str,
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
        self.out, self.backbone, self.sources, self.counts = Path(out), backbone, sources, asdict(windows)
        self.window, self.windows_per_document = window, windows_per_document
        self.windows_per_shard, self.seed, self.trust_remote_code = windows_per_shard, seed, trust_remote_code
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer shards to do than processes
        self.plan: WindowPlan | None = None
        self.runs: list[WindowRun] = []
        self.faults: dict[str, str] = {}  # by file, of the shards that this run makes
        self.entries: dict[str, ShardEntry] = {}  # by file, of those that an earlier manifest vouches for

    @property
    def arguments(self) -> dict[str, Any]:
        """What decides which windows there are."""
        names = ("backbone", "counts", "window", "windows_per_document", "windows_per_shard", "seed")
        return {name: getattr(self, name) for name in names} | {"sources": [asdict(s) for s in self.sources]}

    def prepare_data(self) -> None:
        """Plan the windows, once; a plan that is there is kept."""
        if self.windows_per_shard < 1:
            raise SmartKVError(f"windows_per_shard must be at least 1, got {self.windows_per_shard}")
        path = self.out / PLAN
        if path.exists() and (there := _arguments_of(path)) is not None:
            if there == self.arguments:
                return
            if any(self.out.glob("*-*.safetensors")):  # a plan without shards is no loss
                changed = sorted(k for k in self.arguments if there.get(k) != self.arguments[k])
                raise SmartKVError(
                    f"{self.out} holds another harvest (it differs in {', '.join(changed)}): "
                    "give another 'out', or delete that folder"
                )
        limit = read_architecture(self.backbone, self.trust_remote_code).max_positions
        if self.window > limit:
            raise SmartKVError(f"window {self.window} is longer than the {limit} positions of '{self.backbone}'")
        tokenizer = load_tokenizer(self.backbone, self.trust_remote_code)
        plan = plan_windows(self.sources, self.counts, tokenizer, self.window, self.windows_per_document, self.seed)
        header = {"arguments": self.arguments, "documents": plan.documents, "sources": plan.sources}
        write_shard(path, {"tokens": plan.tokens, "document": plan.document, "split": plan.split}, header)

    def setup(self, stage: str) -> None:
        self.plan = read_plan(self.out)
        self.runs = shard_runs(self.plan, self.windows_per_shard)
        self.entries = {}
        # one process decides what is still to do: others may already be writing when the last one looks
        faults = self._faults() if self.trainer is None or self.trainer.is_global_zero else {}
        self.faults = faults if self.trainer is None else self.trainer.strategy.broadcast(faults)
        self.todo = [run for run in self.runs if run.file in self.faults]

    def _faults(self) -> dict[str, str]:
        """Of each shard that is to be made, what is wrong with its file."""
        recorded = recorded_shards(self.out)
        found = {run.file: self._fault(run, recorded.get(run.file)) for run in WindowRuns(self.plan, self.runs)}
        return {file: fault for file, fault in found.items() if fault is not None}

    def _fault(self, run: WindowRun, recorded: ShardEntry | None) -> str | None:
        """What is wrong with a shard; None: its content is what was written, and its windows are those of the plan.

        Args:
            recorded: what an earlier manifest says of it: of content and not of windows, it may list a foreign shard.

        Raises:
            SmartKVError: a file of that name that is none of ours, or that cannot be read.
        """
        path = self.out / run.file
        if not path.exists():
            return MISSING
        entry = self.entry(run) if recorded else None
        vouched = entry is not None and entry.sha256 == recorded.sha256
        try:
            if not vouched:
                said, held = digests(path)
                if said != held:
                    return DAMAGED if said or recorded else NO_DIGEST
            with open_tensors(path) as file:
                names = set(file.keys())
                same = (n in names and torch.equal(file.get_tensor(n), t) for n, t in run.tensors().items())
                if not all(same):
                    return OTHER_WINDOWS
        except DamagedFile:
            return DAMAGED
        if vouched:
            self.entries[run.file] = entry
        return None

    def entry(self, run: WindowRun) -> ShardEntry:
        """The manifest's line for a shard that is there."""
        return shard_entry(self.out / run.file, run.split, run.windows, run.windows * self.window)

    def check_shards(self, header: dict[str, Any]) -> None:
        """Refuse to add to shards that were made with other settings or another model.

        Args:
            header: of the shards that this run makes.

        Raises:
            SmartKVError: naming the shard and what differs.
        """
        for run in self.runs:
            if run in self.todo:
                continue
            path = self.out / run.file
            there = {"sinks": header["sinks"]} | read_header(path)
            if changed := sorted(key for key in header if there.get(key) != header[key]):
                raise SmartKVError(
                    f"{path} was harvested with other settings (it differs in {', '.join(changed)}): "
                    "give another 'out', or delete that folder"
                )

    def clear_away(self) -> None:
        """Delete the shards that are made again, and say so. Left there, they would pass for made after a run that is
        limited to a few batches."""
        if self.trainer.is_global_zero:
            for fault in (DAMAGED, OTHER_WINDOWS, NO_DIGEST):
                files = [file for file, found in self.faults.items() if found == fault]
                for file in files:
                    (self.out / file).unlink(missing_ok=True)
                if files:
                    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
                    print(f"made again in {self.out}: {', '.join(files[:3])}{more} ({fault})")
        self.trainer.strategy.barrier("faulty shards are deleted")  # before another process has made them anew

    def predict_dataloader(self) -> WindowRuns:
        """This process's shards. Dealt here and not by the Trainer's sampler, which wants one for every process."""
        rank, world_size = process_of(self.trainer)
        return WindowRuns(self.plan, self.todo[rank::world_size])


def _arguments_of(path: Path) -> dict[str, Any] | None:
    """What a plan was made with; None, and a word to the user, if it is damaged: it is made anew then."""
    try:
        said, held = digests(path)
        if said in (None, held):
            return read_header(path)["arguments"]
    except DamagedFile:
        pass
    print(f"{path} is damaged: it is made again")
    return None
