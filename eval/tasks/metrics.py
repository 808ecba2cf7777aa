"""Scores of generated text, 0 to 1, as LongBench and the maths sets define them, by well-kept libraries."""

import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torchmetrics.functional.text import squad

from smartkv.errors import SmartKVError

NEEDED = "{} is needed to score these answers: pip install 'smartkv[tasks]'"


def _library(name: str, package: str) -> ModuleType:
    try:
        return __import__(name)
    except ImportError as error:
        raise SmartKVError(NEEDED.format(package)) from error


def f1(said: str, reference: str, _: Sequence[str] = ()) -> float:
    """F1 of the words, without case, punctuation and articles (SQuAD's)."""
    answers = {"text": [reference], "answer_start": [0]}
    found = squad([{"prediction_text": said, "id": "0"}], [{"answers": answers, "id": "0"}])
    return float(found["f1"]) / 100


def rouge(said: str, reference: str, _: Sequence[str] = ()) -> float:
    """ROUGE-L's F1, by the package that LongBench takes; 0 where there is nothing to compare."""
    library = _library("rouge", "rouge")
    if not said.strip(". \n\t") or not reference.strip(". \n\t"):
        return 0.0
    return float(library.Rouge().get_scores([said], [reference], avg=True)["rouge-l"]["f"])


def classes(said: str, reference: str, known: Sequence[str] = ()) -> float:
    """1 over the number of classes that are named, if the right one is; a class whose name is part of the right one's
    is not counted."""
    named = [name for name in known if name in said and (name == reference or name not in reference)]
    return 1.0 / len(named) if reference in named else 0.0


def count(said: str, reference: str, _: Sequence[str] = ()) -> float:
    """Share of the numbers that are the reference's."""
    numbers, right = re.findall(r"\d+", said), re.findall(r"\d+", reference)
    return sum(number == right[0] for number in numbers) / len(numbers) if numbers and right else 0.0


def code(said: str, reference: str, _: Sequence[str] = ()) -> float:
    """Edit similarity of the first line that is no comment."""
    _library("rapidfuzz", "rapidfuzz")
    from rapidfuzz import fuzz

    lines = (line for line in said.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    return fuzz.ratio(next(lines, ""), reference) / 100


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "f1": f1,
    "rouge": rouge,
    "classes": classes,
    "count": count,
    "code": code,
}


def same_answer(said: str, reference: str) -> float:
    """Whether two solutions of a maths problem come to the same answer, 1 or 0: by math-verify, which reads the last
    `\\boxed{}` or, where there is none, the last number."""
    library = _library("math_verify", "math-verify")

    def parsed(text: str) -> Any:
        return library.parse(text.replace("####", "\nThe answer is"))

    return float(library.verify(parsed(reference), parsed(said)))
