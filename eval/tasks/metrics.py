"""Scores of generated text from 0 to 1, as LongBench and the maths sets define them."""

import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torchmetrics.functional.text import squad

from smartkv.errors import SmartKVError

NEEDED = "{} is needed to score these answers: pip install 'smartkv[tasks]'"


def _library(name: str, package: str) -> ModuleType:
    """Import an optional library, or tell how to install it."""
    try:
        return __import__(name)
    except ImportError as error:
        raise SmartKVError(NEEDED.format(package)) from error


def f1(text: str, reference: str, _: Sequence[str] = ()) -> float:
    """Return SQuAD's F1 of the words, without case, punctuation and articles."""
    answers: dict[str, list[str] | list[int]] = {"text": [reference], "answer_start": [0]}
    target: dict[str, str | dict[str, list[str] | list[int]]] = {"answers": answers, "id": "0"}
    return float(squad([{"prediction_text": text, "id": "0"}], [target])["f1"]) / 100


def rouge(text: str, reference: str, _: Sequence[str] = ()) -> float:
    """Return the F1 of ROUGE-L, by the package that LongBench uses; 0 where a text is empty."""
    library = _library("rouge", "rouge")
    if not text.strip(". \n\t") or not reference.strip(". \n\t"):
        return 0.0
    return float(library.Rouge().get_scores([text], [reference], avg=True)["rouge-l"]["f"])


def classes(text: str, reference: str, known: Sequence[str] = ()) -> float:
    """Return 1 ÷ the number of classes that the text names, if the right one is among them, else 0.

    A class whose name is part of the right class's name is not counted.
    """
    named = [name for name in known if name in text and (name == reference or name not in reference)]
    return 1.0 / len(named) if reference in named else 0.0


def count(text: str, reference: str, _: Sequence[str] = ()) -> float:
    """Return the share of the numbers in the text that equal the reference's."""
    numbers, right = re.findall(r"\d+", text), re.findall(r"\d+", reference)
    return sum(number == right[0] for number in numbers) / len(numbers) if numbers and right else 0.0


def code(text: str, reference: str, _: Sequence[str] = ()) -> float:
    """Return the edit similarity of the reference and the first line that is no comment."""
    lines = (line for line in text.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    return edit_similarity(next(lines, ""), reference)


def edit_similarity(text: str, reference: str) -> float:
    """Return `fuzz.ratio` of two texts, as LCC and RepoBench have it, from 0 to 1."""
    _library("rapidfuzz", "rapidfuzz")
    from rapidfuzz import fuzz

    return fuzz.ratio(text, reference) / 100


def first_code_line(text: str) -> str:
    """Return the first line that is neither empty nor a comment; "" where there is none."""
    lines = (line for line in text.split("\n") if line.strip() and not line.strip().startswith(("#", "//")))
    return next(lines, "")


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "f1": f1,
    "rouge": rouge,
    "classes": classes,
    "count": count,
    "code": code,
}


# GSM8K's last line, such as `#### 18`; `#### 1. Add` is a heading
FINAL = re.compile(r"####[ \t]*(\$?[ \t]*-?\d[\d,]*(?:\.\d+)?)(?![\d,]|[.:)][ \t]*\w)")


def same_answer(text: str, reference: str) -> float:
    r"""Return 1 where two solutions of a maths problem have the same answer, else 0.

    math-verify reads GSM8K's `#### number`, else the last `\boxed{}`, else the last number.
    """
    library = _library("math_verify", "math-verify")

    def parsed(solution: str) -> Any:
        return library.parse(FINAL.sub(r"\nThe answer is \1", solution))

    return float(library.verify(parsed(reference), parsed(text)))
