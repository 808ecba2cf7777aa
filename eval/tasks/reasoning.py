"""`python -m eval reasoning`: GSM8K, MATH-500 and AIME 2024, solved while keys are evicted."""

import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from eval.common.console import make_console
from eval.common.options import CalibrationTexts, Model
from eval.common.results import save_picture
from eval.contenders.base import EvictionProtocol
from eval.tasks.answers import Sample, continuation_ids, prompt_text
from eval.tasks.heatmaps import panels
from eval.tasks.metrics import FINAL, same_answer
from eval.tasks.report import Row, all_lengths, counted, full_of, mean, merged, right_where_full_is, score_table, shown
from eval.tasks.suite import Part, Suite
from smartkv.errors import SmartKVError
from smartkv.texts.sources import SourceConfig, resolve_source

SHOTS = {"gsm8k": 8, "math500": 4, "aime24": 0}  # the usual numbers
NEW_TOKENS = {"gsm8k": 256, "math500": 512, "aime24": 1024}
SETS = {"gsm8k": "\nAnswer: ", "math500": "\nSolution: ", "aime24": "\nSolution: "}  # the text before a solution


def reasoning(
    out: str,
    gates: str | None = None,
    contenders: list[str] | None = None,
    footprints: list[float] = [0.25],  # noqa: B006
    sets: list[str] = list(SETS),  # noqa: B006
    samples: int | None = 20,
    shots: int | dict[str, int] = SHOTS,
    new_tokens: int | dict[str, int] = NEW_TOKENS,
    chat: bool = False,
    instruction: str = "",
    likelihood: bool = True,
    rules_protocol: EvictionProtocol = "stream",
    split: str = "test",
    origins: list[str] = ["local", "hub"],  # noqa: B006
    calibration: CalibrationTexts = CalibrationTexts(),  # noqa: B008
    model: Model = Model(),  # noqa: B008
    seed: int = 0,
) -> None:
    """Measure maths problems: exact match of generated solutions, and the likelihood of the reference solution.

    Problems are taken from a split that was never harvested, and the solved examples before them from the train split.
    Keys are evicted while the examples are read and while the solution is decoded. Small models solve hardly any
    problem; for them only the likelihood tells caches apart.

    Args:
        out: folder for reasoning.json and the picture.
        gates: folder of exported gates, hub id, or the name of gates that come with SmartKV. Null: contenders without.
        contenders: as for `compare`; those that are simulated by a mask generate nothing. Null: gates (where there are
            some) and window.
        footprints: shares of the full cache to keep, for which prices are solved at about each problem's length.
        sets: gsm8k, math500, aime24.
        samples: number of problems of each set, its first ones. Null: all.
        shots: number of solved examples before each problem, one number for all sets or one for each.
        new_tokens: tokens to generate, one number for all sets or one for each; 0: none.
        chat: put problems into the model's chat template, the solved examples as earlier turns.
        instruction: text after each problem, such as how to write the answer.
        likelihood: also measure the likelihood of the reference solution. False: only what is generated counts, and
            prices are solved for the prompt with half of `new_tokens`.
        rules_protocol: of published rules. stream: they evict while the text is read; this is simulated by a mask, and
            nothing is generated. once: they read the prompt with all keys, then keep a share, as published.
        split: train (the problems after the examples), validation or test.
        origins: origins of the sets, in order of preference: local ($SMARTKV_DATA), hub.
        calibration: texts on which prices are solved.
        model: the frozen language model.
        seed: of the choice of calibration windows.
    """
    console = make_console()
    if not sets or any(name not in SETS for name in sets):
        raise SmartKVError(f"sets must be some of {', '.join(SETS)}, got {sets}")
    examples, to_generate = _of_sets("shots", shots, sets), _of_sets("new_tokens", new_tokens, sets)
    if samples is not None and samples < 1:
        raise SmartKVError(f"samples must be at least 1, got {samples}")
    if not likelihood and not all(to_generate.values()):
        raise SmartKVError(f"without likelihood new_tokens must be at least 1 for every set, got {to_generate}")
    suite = Suite(console, model, gates, contenders, footprints, calibration, seed, rules_protocol)
    folder, asked = Path(out), {}
    for name in sets:
        problems = _samples(suite, name, split, samples, examples[name], chat, instruction, likelihood, origins)
        asked[name] = suite.by_length(problems, 0 if likelihood else to_generate[name] // 2)
    for name in sets:  # a problem that is too long ends the run before anything is measured
        suite.check_lengths(asked[name], to_generate[name])
    rows = suite.run(folder, "reasoning", [Part(asked[name], to_generate[name]) for name in sets], _scored)
    settings: dict[str, Any] = {"sets": sets, "samples": samples, "shots": examples, "new_tokens": to_generate}
    settings |= {"chat": chat, "instruction": instruction, "likelihood": likelihood, "split": split}
    together = all_lengths(rows)
    tables = [_table(together, sets, max(to_generate.values()) > 0, likelihood)]
    pictures = [_picture(folder, together, sets, "nll" if likelihood else "score")]
    paired = ({"score": "solved"} if max(to_generate.values()) else {}) | ({"nll": "NLL"} if likelihood else {})
    suite.leave(folder, "reasoning", settings, UNITS, merged(rows), tables, pictures, paired=paired, compared=together)


UNITS = {
    "score": "1 where the generated solution comes to the reference's answer (math-verify), else 0",
    "ended": "the solution came to its end within `new_tokens`",
    "nll": "nats a token of the reference solution",
    "footprint": "keys seen ÷ keys of a full cache, over the last three quarters of the queries, prompt and reference",
    "stored": "bytes held after the prompt ÷ those of its keys and values in float16; null: simulated by a mask",
    "group": "set",
}


def _of_sets(name: str, given: int | dict[str, int], sets: list[str]) -> dict[str, int]:
    """Return the number of each set."""
    numbers = dict.fromkeys(sets, given) if isinstance(given, int) else {each: given.get(each, -1) for each in sets}
    if min(numbers.values()) < 0:
        raise SmartKVError(f"{name} must be at least 0, one number or one for each of {', '.join(sets)}; got {given}")
    return numbers


def _problems(
    suite: Suite, name: str, split: str, origins: list[str], most: int | None, after: int = 0
) -> list[tuple[str, str]]:
    """Read problems and their solutions.

    Args:
        suite: tells the origin of the set.
        name: of the set.
        split: train, validation or test.
        origins: in order of preference.
        most: number of problems; None: all.
        after: number of first problems that are left out, because they are shown as examples.

    Returns:
        (problem with the text before its solution, solution) of each.
    """
    source = resolve_source(SourceConfig(name, origins=list(origins)), suite.say)
    parts = (document.text.partition(SETS[name]) for document in source.documents(split))
    solved = ((problem + mark.rstrip(), solution.strip()) for problem, mark, solution in parts if mark)
    problems = list(islice(solved, after, None if most is None else after + most))
    if not problems:
        raise SmartKVError(
            f"'{name}' has no problems in its {split} split" + (f" after the first {after}" if after else "")
        )
    return problems


def _samples(
    suite: Suite,
    name: str,
    split: str,
    count: int | None,
    shots: int,
    chat: bool,
    instruction: str,
    likelihood: bool,
    origins: list[str],
) -> list[Sample]:
    shown_before = _problems(suite, name, "train", origins, shots) if shots else []
    asked = _problems(suite, name, split, origins, count, after=shots if split == "train" else 0)
    tokenizer, made = suite.lm.tokenizer, []
    for problem, solution in asked:
        if chat:
            turns = [(_question(before, name) + instruction, its) for before, its in shown_before]
            whole, special = prompt_text(tokenizer, _question(problem, name) + instruction, True, shots=turns)
        else:
            examples = "".join(f"{before} {its}\n\n" for before, its in shown_before)
            whole, special = prompt_text(tokenizer, examples + _with_instruction(problem, name, instruction), False)
        prompt = tuple(tokenizer(whole, add_special_tokens=special)["input_ids"])
        answer = continuation_ids(tokenizer, solution if chat else f" {solution}") if likelihood else ()
        made.append(Sample(prompt, answer, (solution,), (name,), text=(len(prompt), len(prompt))))
    return made


def _question(problem: str, name: str) -> str:
    """Return a problem alone, without the words around it that plain prompts have."""
    return problem.removesuffix(SETS[name].rstrip()).partition(": ")[2]


def _with_instruction(problem: str, name: str, instruction: str) -> str:
    """Put the instruction between a problem and the text before its solution."""
    mark = SETS[name].rstrip()
    return problem.removesuffix(mark) + instruction + mark


def _scored(figures: dict[str, Any], sample: Sample) -> dict[str, Any]:
    """Score a generated solution against the reference."""
    text, nll = figures["generated"], figures.get("nll")
    if text is None:
        return {"score": None, "nll": nll}
    solution = first_solution(text, sample.group[0])
    return {
        "score": same_answer(solution, sample.references[0]),
        "nll": nll,
        "ended": figures["ended"] or len(solution) < len(text),
    }


def first_solution(text: str, name: str) -> str:
    """Return the first solution of a generated text, without further problems that the model makes up.

    GSM8K's solutions end with `#### number`; in other sets `####` is a heading.

    Args:
        text: generated text.
        name: of the set.
    """
    solution = re.split(r"\n+(?:Question|Problem):", text)[0]
    end = FINAL.search(solution) if name == "gsm8k" else None
    return solution[: end.end()] if end else solution


def _table(rows: list[Row], sets: list[str], generated: bool, likelihood: bool) -> Table:
    full, lines = full_of(rows, rows[0].length), []
    for row in rows:
        cells = []
        for name in sets:
            if generated:
                share, asked = right_where_full_is(row, full, "score", name)
                score, ended = (mean([sample[key] for sample in row.of(name)]) for key in ("score", "ended"))
                cells += [shown(score, percent=True), shown(ended, percent=True), counted(share, asked)]
            if not likelihood:
                continue
            nll, nll_full = ([sample["nll"] for sample in r.of(name)] for r in (row, full))
            gap = mean([own - whole for own, whole in zip(nll, nll_full, strict=True)]) if nll else None
            cells += [shown(mean(nll), 3), "" if row is full or gap is None else f"{gap:+.4f}"]
        lines.append((row, cells))
    names = [part for name in sets for part in _columns(f"{name} ({len(full.of(name))})", generated, likelihood)]
    return score_table("Reasoning", names, lines)


def _columns(name: str, generated: bool, likelihood: bool) -> list[str]:
    said = [name, "ended", "where full is"] if generated else []
    return said + ([f"NLL {name}", "ΔNLL"] if likelihood else [])


def _picture(folder: Path, rows: list[Row], sets: list[str], key: str) -> Path:
    grid = np.full((len(rows), len(sets)), np.nan)
    for place, row in enumerate(rows):
        for number, name in enumerate(sets):
            value = mean([sample[key] for sample in row.of(name)])
            grid[place, number] = np.nan if value is None else value
    label = "NLL of the reference solution, nats a token" if key == "nll" else "share solved"
    labels = [row.label for row in rows]
    figure = panels({label: grid}, labels, sets, ("", "set"), "Reasoning", label, loss=key == "nll")
    return save_picture(figure, folder / "reasoning.png")
