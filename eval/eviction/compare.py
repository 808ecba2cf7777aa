"""`python -m eval compare`: measures gates, rules, nulls and oracles on the same texts at equal footprint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from eval.common.console import make_console, say_once
from eval.common.options import AdaptedModel, CalibrationTexts, Measure, NamedTexts, Recall, check_names
from eval.common.resume import Measurements, digest, digest_of_model, digests
from eval.contenders.base import Contender, EvictionProtocol, Reading
from eval.contenders.registry import ADAPTIVE_BY_GATES, DEFAULT, load_for, make_contenders, names_or_default
from eval.contenders.solving import solved_setting
from eval.eviction.compare_report import Row, report
from eval.eviction.frontier import REFERENCE
from eval.eviction.recall import Trial, check_kinds, described, trials
from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.labels.lifespans import check_window
from smartkv.metrics.perplexity import query_before
from smartkv.texts.recall import SPARE
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import plan_windows


def compare(
    out: str,
    gates: str | None = None,
    contenders: list[str] | None = None,
    footprints: list[float] = [0.0625, 0.125, 0.25, 0.5],  # noqa: B006
    others: list[float] | None = None,
    protocol: EvictionProtocol = "stream",
    prefill: int = 1024,
    texts: list[NamedTexts] = [NamedTexts(name="books")],  # noqa: B006, B008
    recall: Recall = Recall(),  # noqa: B008
    calibration: CalibrationTexts = CalibrationTexts(windows=6),  # noqa: B008
    measure: Measure = Measure(),  # noqa: B008
    model: AdaptedModel = AdaptedModel(),  # noqa: B008
) -> None:
    """Compare ways to decide which keys stay. A run that was killed goes on where it stopped.

    Args:
        out: folder for compare.json and the pictures.
        gates: folder of exported gates, hub id, or the name of gates that come with SmartKV. Null: only contenders
            without gates.
        contenders: `gates` (the policy stored with them), named policies or YAML files. With @budget behind `gates` the
            price floats, and a footprint is a budget of the whole text. With +8bit behind a name the
            keys that stay are packed in 8 bits; with +k6v4 keys take 6 bits and values 4. Rules: random, key_norm,
            keydiff, snapkv, tova, h2o, expected_attention. Nulls: null:constant, null:position, null:token_table.
            Oracles: oracle:lifespan, oracle:attention. Quantised caches, in which every key stays: quant:fp16, int8,
            int4, kivi, kivi2, kivi4, adaptive, adaptive_gates; in quant:kivi@32 the latest 32 tokens are exact in place
            of the scheme's own 128. For protocol once also NVIDIA's presses, and gates in them: press:knorm …
            press:lifespan (see configs/eval/presses.yaml). The full cache is always measured. Null: gates (where there
            are some), window, and all rules, nulls and oracles.
        footprints: shares of the full cache to keep (protocol once: shares of the prefill's keys).
        others: footprints of contenders that are neither gates nor the sliding window. Null: the same.
        protocol: stream: keys are evicted while the text is read. once: they are evicted when the prefill is over, and
            later keys all stay.
        prefill: tokens of the prefill, for protocol once.
        texts: kinds of text whose negative log-likelihood is measured.
        recall: facts that are stated once in a text and asked for at its end.
        calibration: texts, train split, on which prices are solved and from which nulls learn.
        measure: which tokens are read, and which of them are scored (protocol once: those from prefill on).
        model: the frozen language model, with an adapter if one is given.
    """
    console = make_console()
    window, seed = measure.window, measure.seed
    first_token = measure.score_from if protocol == "stream" else prefill
    if not 1 <= first_token < window:
        name = "score_from" if protocol == "stream" else "prefill"
        raise SmartKVError(f"{name} must be at least 1 and below the window of {window} tokens, got {first_token}")
    if not footprints or not all(0 < f <= 1 for f in [*footprints, *(others or [])]):
        raise SmartKVError(
            f"footprints are shares of the full cache above 0 and at most 1, got {footprints} and others {others}"
        )
    if calibration.windows < 1 or recall.trials < 0 or (not texts and not recall.trials):
        raise SmartKVError("calibration.windows must be at least 1, and there must be texts or recall trials")
    check_kinds(recall)
    if protocol == "once" and recall.trials and recall.tokens < prefill:
        raise SmartKVError(f"recall.tokens {recall.tokens} must be at least the prefill of {prefill}")
    check_names(texts)
    names = names_or_default(contenders, DEFAULT, gates)
    lm, bank = load_for(names, model, gates, protocol)
    check_window(lm.model, window)

    say = say_once(console)

    def windows_of(sources: list[SourceConfig], split: str, count: int) -> tuple[Tensor, list[int], Any]:
        counts = {split: count}
        plan = plan_windows(sources, counts, lm.tokenizer, window, measure.windows_per_document, seed, say)
        return plan.of_split(split), plan.documents_of_split(split), plan.sources

    learn, _, learnt_from = windows_of(calibration.sources, "train", calibration.windows)
    windows_by_text = {text.name: windows_of(text.sources, text.split, text.windows) for text in texts}
    asked: list[Trial] = []
    for kind in recall.kinds if recall.trials else []:
        count = recall.trials if kind == "books" else SPARE * recall.trials
        around, _, _ = windows_of(recall.haystack_of(kind), recall.split, count)
        asked += trials(
            recall.split, recall.trials, recall.tokens, lm.tokenizer, list(around), seed, kind, recall.forms
        )
    provenance = {
        "backbone": model.backbone,
        "model": digest_of_model(lm.model),  # the weights of its adapter included
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "device": lm.model.device.type,
        "protocol": protocol,
        "prefill": prefill if protocol == "once" else None,
        "score_from": first_token,
    }
    weights = digests(bank)
    settings = provenance | {
        "adapter": model.adapter,
        "weights": weights,
        "gates": gates,
        "window": window,
        "texts": {text.name: _described(text, *windows_by_text[text.name]) for text in texts},
        "recall": described(recall, len(asked)),
        "calibration": {"windows": len(learn), "sources": learnt_from},
        "seed": seed,
    }
    with Progress(console=console) as progress:
        prepared = progress.add_task("Calibration", total=None)
        chosen = make_contenders(names, lm, bank, list(learn), first_token, protocol, prefill)
        progress.remove_task(prepared)
        cells = Measurements(Path(out) / "compare.cells", provenance)
        runner = Runner(cells, progress, first_token, prefill if protocol == "once" else None, weights, digest(learn))
        rows = runner.run(chosen, footprints, footprints if others is None else others, windows_by_text, asked)
    report(console, Path(out), settings, rows, {name: owners for name, (_, owners, _) in windows_by_text.items()})


def _described(text: NamedTexts, windows: Tensor, owners: list[int], sources: Any) -> dict[str, Any]:
    """Describe the windows of a text; results of the same windows can be paired."""
    return {
        "split": text.split,
        "windows": len(windows),
        "sources": sources,
        "digest": digest(windows),
        "documents": owners,
    }


class Runner:
    """Reads every text under every contender at every footprint.

    Args:
        cells: measured figures of this and earlier runs.
        progress: shows how far the run is.
        first_token: tokens from this one on are scored.
        prefill: tokens of the prefill, for protocol `once`; None: protocol `stream`.
        weights: digests of the gates; empty without gates.
        learnt_on: digest of the calibration texts.
    """

    def __init__(
        self,
        cells: Measurements,
        progress: Progress,
        first_token: int,
        prefill: int | None,
        weights: dict[str, str],
        learnt_on: str,
    ) -> None:
        self.cells, self.progress, self.first_token, self.prefill, self.weights = (
            cells,
            progress,
            first_token,
            prefill,
            weights,
        )
        self.learnt_on = learnt_on

    def run(
        self,
        contenders: Sequence[Contender],
        footprints: Sequence[float],
        others: Sequence[float],
        texts: dict[str, tuple[Tensor, list[int], Any]],
        asked: Sequence[Trial],
    ) -> list[Row]:
        """Measure all contenders.

        Args:
            contenders: the full cache first: facts that it does not recall are not asked of the others.
            footprints: of gates and the sliding window.
            others: footprints of the other contenders.
            texts: by name, windows (ids `[windows, tokens]`), the document of each window, and the sources.
            asked: trials of recall.

        Returns:
            A row for each contender and each footprint that it can reach.
        """
        solved: list[tuple[Contender, float, Any]] = []
        task = self.progress.add_task("Prices", total=None)
        for contender in contenders:
            main = contender.kind == "ours" or contender.name == REFERENCE
            keeps_all = contender.kind in ("full", "quantised")
            for target in [1.0] if keeps_all else sorted(set(footprints if main else others)):
                try:
                    setting = solved_setting(self.cells, contender, target, self.weights, self.learnt_on)
                    solved.append((contender, target, setting))
                except FootprintOutOfReach as error:  # the other footprints are still measured
                    self.progress.console.print(f"left out: {error}", highlight=False)
        self.progress.remove_task(task)
        texts_read = sum(len(windows) for windows, *_ in texts.values())
        work = texts_read + len(asked)
        task = self.progress.add_task("Comparing", total=work * len(solved))
        rows = []
        for contender, target, setting in solved:
            self.progress.update(task, description=f"{contender.name} at {target:g}")
            row = Row(contender.name, contender.kind, contender.needs, target, setting)
            for name, (windows, *_) in texts.items():
                row.texts[name] = []
                for tokens in windows:
                    row.texts[name].append(self._window(contender, setting, tokens))
                    self.progress.advance(task)
            for trial in asked:
                row.recall.append(self._trial(contender, setting, trial) | {"kind": trial.kind})
                self.progress.advance(task)
            if contender.kind == "full":  # facts that it does not recall are not asked of the others
                asked = [trial for trial, figures in zip(asked, row.recall, strict=True) if figures["right"]]
                self.progress.update(task, total=work + (texts_read + len(asked)) * (len(solved) - 1))
            rows.append(row)
        return rows

    def _window(self, contender: Contender, setting: Any, tokens: Tensor) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            first_query = query_before(self.first_token)
            return _figures(contender.read(setting, tokens, self.first_token, first_query, self.prefill))

        return self.cells.measured([*self._settings(contender, setting), digest(tokens)], measure)

    def _trial(self, contender: Contender, setting: Any, trial: Trial) -> dict[str, Any]:
        tokens = torch.tensor([*trial.context, *trial.question, *trial.answer])
        prefill = None if self.prefill is None else len(trial.context)

        def measure() -> dict[str, Any]:
            first_query = query_before(self.first_token) if prefill is None else prefill  # a prefill sees all keys
            reading = contender.read(setting, tokens, len(tokens) - len(trial.answer), first_query, prefill)
            return _figures(reading) | {"right": bool((reading.rank == 0).all())}

        return self.cells.measured([*self._settings(contender, setting), digest(tokens), len(trial.answer)], measure)

    def _settings(self, contender: Contender, setting: Any) -> list[Any]:
        """Return what a figure depends on besides its text. Only contenders with gates depend on the gates' weights."""
        learned = contender.kind == "ours" or contender.name == ADAPTIVE_BY_GATES
        return [contender.name, setting, self.weights if learned else {}]


def _figures(reading: Reading) -> dict[str, Any]:
    figures = {
        "footprint": reading.footprint,
        "peak_bytes": reading.peak_bytes,
        "stored": reading.stored,
        "held": reading.held,
    }
    return {"nll": float(reading.nll.double().mean())} | figures
