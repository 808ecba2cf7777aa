"""`python -m eval code_completion`: a line of code, held out and completed after its file and others of its package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from eval.common.console import make_console
from eval.common.options import CalibrationTexts, Model
from eval.common.results import save_picture
from eval.contenders.base import EvictionProtocol
from eval.tasks.answers import Sample, continuation_ids
from eval.tasks.code_files import NAME, held_lines, package_of, related_first
from eval.tasks.heatmaps import panels
from eval.tasks.metrics import edit_similarity, first_code_line
from eval.tasks.report import Row, counted, full_of, mean, merged, right_where_full_is, score_table, shown
from eval.tasks.suite import Part, Suite
from smartkv.errors import SmartKVError
from smartkv.texts.documents import Document
from smartkv.texts.sources import SourceConfig, resolve_source

OWN = 0.5  # share of the tokens that the held line's own file gets, if it has as many
NEAR = 1500  # characters before a line, about 400 tokens
GROUPS = ("near", "file", "others", "new")  # where the names of the line stand last, the farthest of them


def code_completion(
    out: str,
    gates: str | None = None,
    contenders: list[str] | None = None,
    footprints: list[float] = [0.25],  # noqa: B006
    lengths: list[int] = [4096],  # noqa: B006
    samples: int = 60,
    new_tokens: int = 48,
    rules_protocol: EvictionProtocol = "stream",
    split: str = "test",
    source: SourceConfig = SourceConfig("code"),  # noqa: B008
    calibration: CalibrationTexts = CalibrationTexts([SourceConfig("code")]),  # noqa: B008
    model: Model = Model(),  # noqa: B008
    seed: int = 0,
) -> None:
    """Measure how well a held line of code is completed, in the manner of RepoBench and LCC.

    The prompt has other files of the package, those that the file imports last, and the file itself up to the held
    line. The first line of the generated text that is no comment is compared with the held line, without indentation:
    exact match, and edit similarity (`fuzz.ratio`, as both benchmarks have it). No figure needs a chat template.

    Args:
        out: folder for code_completion.json and the picture.
        gates: folder of exported gates, hub id, or the name of gates that come with SmartKV. Null: contenders without.
        contenders: as for `compare`; those that are simulated by a mask generate nothing. Null: gates (where there are
            some) and window.
        footprints: shares of the full cache to keep, for which prices are solved at each length.
        lengths: tokens of a prompt with its answer, at most.
        samples: number of held lines of each length, each of another file; fewer if there are not as many files.
        new_tokens: tokens to generate for each sample, at least as many as a line has.
        rules_protocol: of published rules. stream: they evict while the text is read; this is simulated by a mask, and
            nothing is generated. once: they read the prompt with all keys, then keep a share, as published.
        split: train, validation or test; all files of a package are in one of them.
        source: of the code. Its `path` is a folder of yours with source files; null: Python's standard library and the
            packages that are installed beside it.
        calibration: texts on which prices are solved.
        model: the frozen language model.
        seed: of the choice of files and lines.
    """
    console = make_console()
    if not lengths or min(lengths) < 256 or samples < 1 or new_tokens < 1:
        raise SmartKVError(
            f"lengths must be at least 256 tokens, samples and new_tokens at least 1, got {lengths}, {samples}, "
            f"{new_tokens}"
        )
    suite = Suite(console, model, gates, contenders, footprints, calibration, seed, rules_protocol)
    resolved = resolve_source(source, suite.say)
    documents = list(resolved.documents(split))
    if not documents:
        reason = resolved.own.why_none(split) if resolved.own else f"no document is in split {split}"
        raise SmartKVError(f"source '{source.name}': {reason}")
    sizes, folder = sorted(set(lengths)), Path(out)
    by_length = {length: held_samples(suite, documents, length, samples, new_tokens) for length in sizes}
    rows = suite.run(folder, "code_completion", [Part(by_length, new_tokens)], _scored)
    settings = {"lengths": sizes, "samples": samples, "new_tokens": new_tokens, "split": split}
    settings |= {"source": source.name, "path": source.path}
    paired = {"exact": "exact", "similarity": "similarity", "nll": "NLL"}
    rows = merged(rows)
    tables, pictures = [_table(rows), _groups_table(rows)], [_picture(folder, rows)]
    suite.leave(folder, "code_completion", settings, UNITS, rows, tables, pictures, paired=paired)


UNITS = {
    "exact": "1 where the first generated line that is no comment is the held line, indentation aside, else 0",
    "similarity": "edit similarity of the two lines, 0 to 1 (rapidfuzz's fuzz.ratio)",
    "nll": "nats a token of the held line",
    "footprint": "keys seen ÷ keys of a full cache, over the queries of the last three quarters of prompt and line",
    "stored": "bytes held after the prompt ÷ those of its keys and values in float16; null: simulated by a mask",
    "group": "the farthest of the line's names stands last: `near` (within 1,500 characters), in its `file`, in the "
    "`others`, or nowhere (`new`); `cluster`: the package",
}


def held_samples(suite: Suite, documents: Sequence[Document], length: int, count: int, new_tokens: int) -> list[Sample]:
    """Hold out a line of each of some files.

    Args:
        suite: has the tokenizer and the seed, and tells how many lines there are.
        documents: files of all packages. A package of one file is left out, because it has no other.
        length: most tokens of a prompt with its line. A prompt has at least three quarters as many.
        count: number of samples; fewer if there are not as many files that are long enough.
        new_tokens: a line has at most so many.
    """
    packages: dict[str, list[Document]] = {}
    for document in documents:
        packages.setdefault(package_of(document.id), []).append(document)
    random, made = np.random.default_rng([suite.seed, length]), list[Sample]()
    shuffled = {
        name: [files[place] for place in random.permutation(len(files))]
        for name, files in packages.items()
        if len(files) > 1  # else there are no other files
    }
    for turn in range(max(map(len, shuffled.values()), default=0)):  # a file of each package in turn
        for name, files in shuffled.items():
            if turn < len(files) and len(made) < count:
                others = related_first(files[turn], [file for file in files if file is not files[turn]])
                sample = _held_sample(suite, name, files[turn], others, length, new_tokens, random)
                made += [sample] if sample is not None else []
    if len(made) < count:
        suite.say(f"only {len(made)} of {count} files have a line with {length * 3 // 4:,} tokens of code before it")
    return made


def _held_sample(
    suite: Suite,
    package: str,
    document: Document,
    others: list[Document],
    length: int,
    new_tokens: int,
    random: np.random.Generator,
) -> Sample | None:
    """Hold out one line of a file; None: no line of it has enough code before it."""
    lines, tokenizer = document.text.split("\n"), suite.lm.tokenizer
    for number in random.permutation(held_lines(document))[:4].tolist():
        answer = continuation_ids(tokenizer, lines[number])
        before = continuation_ids(tokenizer, "\n".join([*lines[:number], ""]))
        title = continuation_ids(tokenizer, f"# {document.id}\n")
        room = length - len(answer) - len(title) - 1  # one for a token that some models begin with
        if len(answer) > new_tokens or len(before) < length // 8 or room < 1:
            continue
        head, shown = _other_files(suite, others, room - min(len(before), int(OWN * room)))
        own = before[-(room - len(head)) :]
        start = tuple(tokenizer("")["input_ids"])
        prompt = (*start, *head, *title, *own)
        if len(prompt) + len(answer) >= length * 3 // 4:
            own_text = str(tokenizer.decode(list(own)))
            group = (_farthest(lines[number], own_text, shown),)
            return Sample(prompt, answer, (lines[number].strip(),), group, cluster=package)
    return None


def _other_files(suite: Suite, others: list[Document], room: int) -> tuple[tuple[int, ...], str]:
    """Return the beginnings of other files that fit, as ids and as text. The first of `others` comes last."""
    parts: list[tuple[int, ...]] = []
    for document in others:
        if room <= 0:
            break
        ids = continuation_ids(suite.lm.tokenizer, f"# {document.id}\n{document.text.rstrip()[: 8 * room]}\n\n")[:room]
        parts.insert(0, ids)
        room -= len(ids)
    joined = tuple(token for part in parts for token in part)
    return joined, str(suite.lm.tokenizer.decode(list(joined)))


def _farthest(line: str, own: str, others: str) -> str:
    """Return where the farthest of a line's names stands last, one of `GROUPS`."""
    found = {_place(name, own, others) for name in NAME.findall(line)}
    return max(found, key=GROUPS.index)


def _place(name: str, own: str, others: str) -> str:
    if name in own:
        return "near" if name in own[-NEAR:] else "file"
    return "others" if name in others else "new"


def _scored(figures: dict[str, Any], sample: Sample) -> dict[str, Any]:
    """Score the first line of a generated text against the held one."""
    text = figures["generated"]
    if text is None:
        return {"exact": None, "similarity": None}
    line, reference = first_code_line(text).strip(), sample.references[0]
    return {"exact": float(line == reference), "similarity": edit_similarity(line, reference)}


def _table(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        kept = right_where_full_is(row, full_of(rows, row.length), "exact")
        exact, similarity, nll = (mean([s[key] for s in row.samples]) for key in ("exact", "similarity", "nll"))
        cells = (shown(exact, percent=True), counted(*kept), shown(similarity, 3), shown(nll, 3))
        lines.append((row, (f"{row.length:,}", *cells)))
    return score_table("code_completion", ("tokens", "exact", "exact where full is", "similarity", "NLL"), lines)


def _groups(rows: list[Row]) -> list[str]:
    return [group for group in GROUPS if any(row.of(group) for row in rows)]


def _groups_table(rows: list[Row]) -> Table:
    table = Table(title="Exact match, by where the farthest of the line's names stands last")
    for number, name in enumerate(("", "tokens", *(f"{g} ({len(rows[0].of(g))})" for g in _groups(rows)))):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        cells = (shown(mean([sample["exact"] for sample in row.of(group)])) for group in _groups(rows))
        table.add_row(row.label, f"{row.length:,}", *cells)
    return table


def _picture(folder: Path, rows: list[Row]) -> Path:
    labels, grids = list(dict.fromkeys(row.label for row in rows)), {}
    for length in sorted({row.length for row in rows}):
        grid = np.full((len(labels), 2), np.nan)
        for row in (row for row in rows if row.length == length):
            for number, key in enumerate(("exact", "similarity")):
                value = mean([sample[key] for sample in row.samples])
                grid[labels.index(row.label), number] = np.nan if value is None else value
        grids[f"{length:,} tokens"] = grid
    columns = ["exact match", "edit similarity"]
    figure = panels(grids, labels, columns, ("", "of a held line"), "Code completion", "share")
    return save_picture(figure, folder / "code_completion.png")
