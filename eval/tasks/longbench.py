"""`python -m eval longbench`: LongBench v1 (English and code) for every contender at every footprint."""

import ast
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eval.common.console import make_console
from eval.common.options import CalibrationTexts, Model
from eval.common.results import save_picture
from eval.tasks.answers import Sample, continuation_ids, cut_in_the_middle, prompt_ids
from eval.tasks.heatmaps import panels
from eval.tasks.metrics import METRICS
from eval.tasks.report import Row, all_lengths, group_table, mean, merged
from eval.tasks.suite import Part, Suite
from smartkv.errors import SmartKVError

TASKS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
HUB = "zai-org/LongBench"  # formerly THUDM/LongBench
FIELDS = ("input", "context", "answers")


def longbench(
    out: str,
    gates: str | None = None,
    contenders: list[str] | None = None,
    footprints: list[float] = [0.25],  # noqa: B006
    tasks: list[str] = list(TASKS),  # noqa: B006
    data: str = HUB,
    samples: int | None = None,
    longest: int = 3500,
    new_tokens: int | None = None,
    chat: bool = False,
    calibration: CalibrationTexts = CalibrationTexts(),  # noqa: B008
    model: Model = Model(),  # noqa: B008
    seed: int = 0,
) -> None:
    """Measure LongBench v1 (Bai et al. 2023) with its prompts, its truncation in the middle and its metrics.

    Args:
        out: folder for longbench.json and the picture.
        gates: folder of exported gates, hub id, or the name of gates that come with SmartKV. Null: contenders without.
        contenders: as for `compare`, but only those that decode: policies and quantised caches. Null: gates (where
            there are some) and window.
        footprints: shares of the full cache to keep, for which prices are solved at about each prompt's length.
        tasks: names of tasks; those in Chinese are left out.
        data: hub id, or a folder with <task>.jsonl in it (fields input, context, answers, all_classes).
        samples: number of samples of each task, its first ones. Null: all.
        longest: most tokens of a prompt; a longer one loses its middle.
        new_tokens: tokens to generate. Null: the number that was published for each task.
        chat: put prompts into the model's chat template, except for tasks that LongBench asks without it.
        calibration: texts on which prices are solved.
        model: the frozen language model.
        seed: of the choice of calibration windows.
    """
    console = make_console()
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise SmartKVError(f"there are no tasks {unknown}: expected some of {', '.join(TASKS)}")
    if longest < 16 or (samples is not None and samples < 1) or (new_tokens is not None and new_tokens < 1):
        raise SmartKVError("longest must be at least 16 tokens, samples and new_tokens at least 1")
    suite = Suite(console, model, gates, contenders, footprints, calibration, seed)
    folder, asked = Path(out), {}
    for task in tasks:  # a task that cannot be read ends the run before anything is measured
        records = read_records(data, task, samples)
        asked[task] = suite.by_length([_sample(suite, task, record, longest, chat) for record in records])
        suite.check_lengths(asked[task], new_tokens or TASKS[task]["tokens"])
    parts = [Part(asked[task], new_tokens or TASKS[task]["tokens"]) for task in tasks]
    rows = suite.run(folder, "longbench", parts, _scored)
    settings = {"tasks": tasks, "data": data, "samples": samples, "longest": longest, "chat": chat}
    together = all_lengths(rows)
    table = group_table("LongBench: score by task", together, tasks, "score", 3)
    suite.leave(
        folder,
        "longbench",
        settings,
        UNITS,
        merged(rows),
        [table],
        [_picture(folder, together, tasks)],
        paired={"score": "score", "nll": "NLL"},
        compared=together,
    )


UNITS = {
    "score": "0 to 1: F1, ROUGE-L, share of classes or numbers, edit similarity, by task; the best of the references",
    "nll": "nats a token of the first reference",
    "footprint": "keys seen ÷ keys of a full cache, over the last three quarters of the queries, prompt and reference",
    "stored": "bytes held after the prompt ÷ those of its keys and values in float16",
    "group": "task",
}


def read_records(data: str, task: str, samples: int | None) -> Iterator[dict[str, Any]]:
    """Read the records of a task from a folder or from the hub.

    Args:
        data: folder or hub id.
        task: name of the task.
        samples: number of records; None: all.

    Raises:
        SmartKVError: the task cannot be read, or a record lacks a field.
    """
    path = Path(data) / f"{task}.jsonl"
    if Path(data).is_dir() and not path.is_file():
        raise SmartKVError(f"{data} has no {task}.jsonl")
    lines = _lines(path) if path.is_file() else _from_hub(data, task)
    for number, record in enumerate(lines):
        if samples is not None and number >= samples:
            return
        if not isinstance(record, dict):
            raise SmartKVError(f"record {number} of '{task}' is no object with fields: {str(record)[:80]}")
        missing = [name for name in FIELDS if name not in record]
        if missing or not _listed(record["answers"]):
            raise SmartKVError(f"record {number} of '{task}' lacks {', '.join(missing) or 'any answer'}")
        yield record | {"answers": _listed(record["answers"]), "all_classes": _listed(record.get("all_classes"))}


def _lines(path: Path) -> Iterator[Any]:
    """Read a file of JSON lines."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:  # UnicodeDecodeError is one
                raise SmartKVError(f"{path}, line {number}, is not JSON: {error}") from error


def _from_hub(repository: str, task: str) -> Iterator[Any]:
    """Read a task from the hub's archive, which has a file for each task. The hub's loading script is not run."""
    from zipfile import BadZipFile, ZipFile

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        archive = hf_hub_download(repository, "data.zip", repo_type="dataset")
        with ZipFile(archive) as files, files.open(f"data/{task}.jsonl") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, HfHubHTTPError, BadZipFile, KeyError, ValueError) as error:
        raise SmartKVError(
            f"'{task}' of {repository} cannot be had ({type(error).__name__}): give --data a folder with {task}.jsonl"
        ) from error


def _listed(value: Any) -> list[str]:
    """Return a list of texts; some copies of the data hold lists as text."""
    if value is None:
        return []
    if isinstance(value, str) and value.startswith(("[", "(")):
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    return [str(entry) for entry in value] if isinstance(value, (list, tuple)) else [str(value)]


def _sample(suite: Suite, task: str, record: dict[str, Any], longest: int, chat: bool) -> Sample:
    """Make a sample: the prompt is shortened as plain text, then put into the chat template."""
    tokenizer, text = suite.lm.tokenizer, str(TASKS[task]["prompt"].format(**record))
    ids = cut_in_the_middle(prompt_ids(tokenizer, text, False), longest)
    chat = chat and not TASKS[task].get("bare")
    prompt = prompt_ids(tokenizer, str(tokenizer.decode(list(ids), skip_special_tokens=True)), chat) if chat else ids
    answer = continuation_ids(tokenizer, f" {record['answers'][0]}")
    return Sample(prompt, answer, tuple(record["answers"]), (task,), tuple(record["all_classes"]))


def _scored(figures: dict[str, Any], sample: Sample) -> dict[str, Any]:
    """Score a generated text by the task's metric; the best of the references counts."""
    task, text = TASKS[sample.group[0]], figures["generated"]
    if text is None:
        return {"score": None}
    if task.get("first_line"):
        text = text.lstrip("\n").split("\n")[0]
    scores = [METRICS[task["metric"]](text, reference, sample.classes) for reference in sample.references]
    return {"score": max(scores)}


def _picture(folder: Path, rows: list[Row], tasks: list[str]) -> Path:
    grid = np.full((len(rows), len(tasks)), np.nan)
    for place, row in enumerate(rows):
        for number, task in enumerate(tasks):
            value = mean([sample["score"] for sample in row.of(task)])
            grid[place, number] = np.nan if value is None else value
    labels = [row.label for row in rows]
    return save_picture(
        panels({"score": grid}, labels, tasks, ("", "task"), "LongBench", "score"), folder / "longbench.png"
    )
