"""`python -m eval needle`: the needle in the haystack, a fact at every depth of texts of every length."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table

from eval.common.console import make_console
from eval.common.contender_styles import contender_label
from eval.common.figures import heads_heatmap
from eval.common.options import CalibrationTexts, Model
from eval.common.results import save_picture
from eval.contenders.base import EvictionProtocol
from eval.eviction.recall import Trial, trial
from eval.tasks.answers import Sample
from eval.tasks.heatmaps import panels
from eval.tasks.needle_predictions import predictions
from eval.tasks.report import Row, all_lengths, counted, full_of, mean, merged, right_where_full_is, score_table, shown
from eval.tasks.suite import Part, Suite
from smartkv.errors import SmartKVError
from smartkv.texts.sources import SourceConfig

SPARE = 96  # tokens of a text's length that are reserved for fact, question and answer


def needle(
    out: str,
    gates: str | None = None,
    contenders: list[str] | None = None,
    footprints: list[float] = [0.125, 0.25],  # noqa: B006
    lengths: list[int] = [1024, 2048, 4096],  # noqa: B006
    depths: int = 8,
    samples: int = 4,
    split: str = "test",
    new_tokens: int = 16,
    rules_protocol: EvictionProtocol = "stream",
    haystack: list[SourceConfig] = [SourceConfig("pg19")],  # noqa: B006, B008
    calibration: CalibrationTexts = CalibrationTexts(),  # noqa: B008
    model: Model = Model(),  # noqa: B008
    seed: int = 0,
) -> None:
    """Measure the needle in the haystack by depth and length, for every contender at every footprint.

    A fact is stated once in a text. At the text's end the model has to repeat the sentence, of which the last word is
    left out. Small models can do that even if they cannot answer questions. The measures are the word's likelihood
    (`nll`, `rank`; `right`: each of its tokens is the likeliest) and whether the generated text contains the word.
    Shares are of the needles that the full cache finds. With gates there is also what they predict of the fact's keys,
    by layer.

    Args:
        out: folder for needle.json and the pictures.
        gates: folder of exported gates, hub id, or the name of gates that come with SmartKV. Null: contenders without.
        contenders: as for `compare`; those that are simulated by a mask generate nothing. Null: gates (where there are
            some) and window.
        footprints: shares of the full cache to keep, for which prices are solved at each length.
        lengths: tokens of a sample, question and answer included.
        depths: number of places of the fact, evenly spread.
        samples: number of samples of each length and depth, each with a text, a name and a number of its own.
        split: train, validation or test, of the text and of the forms of facts.
        new_tokens: tokens to generate for each sample; 0: none, which takes half the time.
        rules_protocol: of published rules. stream: they evict while the text is read; this is simulated by a mask, and
            nothing is generated. once: they read the prompt with all keys, then keep a share, as published.
        haystack: the text around the facts.
        calibration: texts on which prices are solved.
        model: the frozen language model.
        seed: of texts, names and numbers.
    """
    console = make_console()
    if not lengths or min(lengths) < 4 * SPARE or min(depths, samples) < 1 or new_tokens < 0:
        raise SmartKVError(
            f"lengths must be at least {4 * SPARE} tokens, depths and samples at least 1, new_tokens at least 0, "
            f"got {lengths}, {depths}, {samples}, {new_tokens}"
        )
    suite = Suite(console, model, gates, contenders, footprints, calibration, seed, rules_protocol)
    places = [round((number + 0.5) / depths, 3) for number in range(depths)]
    by_length = {length: _samples(suite, haystack, split, length, places, samples) for length in sorted(set(lengths))}
    folder = Path(out)
    rows = suite.run(folder, "needle", [Part(by_length, new_tokens)], _answer_in_text)
    settings = {"lengths": sorted(set(lengths)), "depths": places, "samples": samples, "split": split}
    settings |= {"new_tokens": new_tokens, "haystack": [source.name for source in haystack]}
    tables, pictures, more = [_table(rows, new_tokens > 0)], _pictures(folder, rows, places), dict[str, Any]()
    if suite.bank is not None:
        facts = [sample for group in by_length.values() for sample in group]
        with Progress(console=console) as progress:
            predicted = predictions(suite.lm, suite.bank, progress.track(facts, description="Predictions of the facts"))
        more["predicted"] = predicted.to_dict()
        tables, pictures = [*tables, predicted.table()], [*pictures, predicted.picture(folder)]
    paired = {"right": "right"} | ({"said": "said"} if new_tokens else {}) | {"nll": "NLL"}
    compared = [*rows, *(all_lengths(rows) if len(by_length) > 1 else [])]
    suite.leave(folder, "needle", settings, UNITS, rows, tables, pictures, more, paired, compared)


UNITS = {
    "nll": "nats a token of the answer",
    "rank": "tokens that the model thinks likelier, the worst of the answer's",
    "right": "every token of the answer is the likeliest",
    "said": "the generated text has the answer in it",
    "footprint": "keys seen ÷ keys of a full cache, over the queries of the last three quarters of prompt and answer",
    "stored": "bytes held after the prompt ÷ those of its keys and values in float16; null: simulated by a mask",
    "kept": "by layer and KV head, share of the fact's keys that are still held when it is asked for; null: simulated",
    "group": "length in tokens, depth as a share",
    "predicted": "by layer and KV head, mean score of the gates for the fact's keys and for those of the text around; "
    "by_layer: the same as amounts in `unit`",
}


def _file_name(label: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "+." else "_" for letter in label)


def _samples(
    suite: Suite, haystack: list[SourceConfig], split: str, length: int, places: list[float], count: int
) -> list[Sample]:
    texts = suite.texts(haystack, split, count * len(places), length)
    random = np.random.default_rng([suite.seed, length])
    made = []
    for number, text in enumerate(texts):
        depth = places[number % len(places)]
        fact = trial(split, number // len(places), depth, suite.lm.tokenizer, text[: length - SPARE], random)
        made.append(_sample(suite, fact, length, text))
    return made


def _sample(suite: Suite, fact: Trial, length: int, text: torch.Tensor) -> Sample:
    """Make a sample of a trial, with as much more text at its start as makes it `length` tokens long."""
    used = len(fact.context) + len(fact.question) + len(fact.answer)
    more = text[length - SPARE : length - SPARE + max(0, length - used)].tolist()
    prompt = (*fact.context[:1], *more, *fact.context[1:], *fact.question)
    body = length - SPARE
    start = int(fact.depth * body) + len(more)
    marked = (start, start + len(fact.context) - body)
    reference = str(suite.lm.tokenizer.decode(list(fact.answer))).strip()
    text_place = (0, len(prompt) - len(fact.question))
    return Sample(prompt, fact.answer, (reference,), (length, fact.depth), marked=marked, text=text_place)


def _answer_in_text(figures: dict[str, Any], sample: Sample) -> dict[str, Any]:
    """Score whether the generated text contains the answer."""
    text = figures["generated"]
    return {"said": None if text is None else float(sample.references[0].lower() in text.lower())}


def _table(rows: list[Row], generated: bool) -> Table:
    lines = []
    for row in sorted(rows, key=lambda r: (r.length, r.kind != "full")):
        full = full_of(rows, row.length)
        share, asked = right_where_full_is(row, full, "right")
        generated_right = counted(*right_where_full_is(row, full, "said")) if generated else ""
        nll = mean([sample["nll"] for sample in row.samples])
        rank = float(np.median([sample["rank"] for sample in row.samples]))
        cells = (f"{row.length:,}", counted(share, asked), generated_right)
        lines.append((row, (*cells, shown(nll, 3), f"{rank:.0f}")))
    return score_table("needle", ("tokens", "right", "said", "NLL", "median rank"), lines)


def _pictures(folder: Path, rows: list[Row], places: list[float]) -> list[Path]:
    lengths = sorted({row.length for row in rows})
    labels = list(dict.fromkeys(row.label for row in rows))
    names = ("depth of the fact", "length of the text, tokens")
    pictures = []
    for key, title, loss in (("right", "share of needles found", False), ("nll", "NLL of the answer, nats", True)):
        grids = {}
        for label in labels:
            grid = np.full((len(places), len(lengths)), np.nan)
            for row in (row for row in rows if row.label == label):
                for number, place in enumerate(places):
                    value = mean([sample[key] for sample in row.of(row.length, place)])
                    grid[number, lengths.index(row.length)] = np.nan if value is None else value
            grids[label] = grid
        figure = panels(
            grids, [f"{p:.0%}" for p in places], [f"{n:,}" for n in lengths], names, f"Needle: {title}", title, loss
        )
        pictures.append(save_picture(figure, folder / f"needle_{key}.png"))
    for row in merged([replace(row, length=0) for row in rows if row.kind == "ours"]):
        kept = np.mean([sample["kept"] for sample in row.samples], axis=0)
        title = f"Keys of the fact held when it is asked for: {contender_label(row.label)}"
        figure = heads_heatmap(kept, range(len(kept)), title, "share of the fact's keys")
        pictures.append(save_picture(figure, folder / f"needle_kept_{_file_name(row.label)}.png"))
    return pictures
