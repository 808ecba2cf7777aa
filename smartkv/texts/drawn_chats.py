"""Conversations that are drawn: a user poses problems and pastes passages, and refers back to them in later turns.

Problems with their solutions are those of gsm8k, passages those of pg19, or of the prose that Python itself ships.
Every answer is known exactly. A conversation of a split has only problems and passages of that split; validation and
test have other wordings than training.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from smartkv.texts.documents import Document, Message
from smartkv.texts.known_sources import KNOWN
from smartkv.texts.origins import SourceUnavailable, builtin_documents, hub_documents, local_documents

COUNT = {"train": 1200, "validation": 120, "test": 120}  # conversations of each split
SEEDS = {"train": 1, "validation": 2, "test": 3}
EXCHANGES = (4, 12)  # fewest and most exchanges of a conversation
NEW = 0.4  # share of the exchanges with a new problem or passage
PASSAGE_WORDS = (50, 160)  # range of the words of a passage
MOST = {"problems": 4000, "texts": 24}  # read of a source
OPENING = 6  # words that name a problem or a passage
TRIES = 40  # places at which a passage is looked for
LOOKS = 5  # how often a text is tried before it counts as one without passages

FORMS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("drawn_chats.yaml").read_text(encoding="utf-8"))
ABBREVIATIONS = "".join(rf"(?<!\b{each}\.)" for each in ("Mr", "Mrs", "Ms", "Dr", "St", "No", "Col", "e.g", "i.e"))
SENTENCE_END = re.compile(rf"""(?<=[.!?])["'”]?{ABBREVIATIONS}\s+(?=["'“]?[A-Z])""")
CALCULATION = re.compile(r"<<(\d+)([+*-])(\d+)=(\d+)>>")
NUMBER = re.compile(r"(?<![\w.,/])\d+(?![\w/]|[.,]\d)")
Random = np.random.Generator
Pair = tuple[str, str]  # the user's message, the assistant's


def drawn_chats(origins: Sequence[str]) -> tuple[Callable[[str], Iterator[Document]], str]:
    """Find problems and passages, and return the conversations that are drawn from them.

    Args:
        origins: Where to look for gsm8k and pg19: `local`, `hub`. Empty: `local`.

    Returns:
        A function that takes a split and yields its conversations, and what they are drawn from, in words.
    """
    problems, passages = (_found(name, origins or ["local"]) for name in ("gsm8k", "pg19"))
    texts = passages or (builtin_documents, "the manual of Python itself")

    def documents(split: str) -> Iterator[Document]:
        solved = [] if problems is None else [parse(each.text) for each in islice(problems[0](split), MOST["problems"])]
        prose = [each.text for each in islice(texts[0](split), MOST["texts"]) if has_passages(each.text)]
        for number in range(COUNT[split]):
            random = np.random.default_rng([SEEDS[split], number])
            if messages := Conversation([each for each in solved if each], prose, split, random).draw():
                yield Document(f"{split}/{number:04d}", "", messages)

    return documents, " and ".join(each[1] for each in (problems, texts) if each is not None)


def _found(name: str, origins: Sequence[str]) -> tuple[Callable[[str], Iterator[Document]], str] | None:
    """Return the documents of a source and what it is called, from the first origin that has it; None if none has."""
    for origin in origins:
        try:
            return {"local": local_documents, "hub": hub_documents}[origin](KNOWN[name]), f"{name} ({origin})"
        except SourceUnavailable:
            continue
    return None


@dataclass(frozen=True)
class Problem:
    """A problem with its solution.

    Attributes:
        question: The problem.
        steps: Lines of the solution.
        answer: The result.
        calculations: Steps `a op b = c` with whole numbers.
    """

    question: str
    steps: tuple[str, ...]
    answer: str
    calculations: tuple[tuple[int, str, int], ...]


def parse(text: str) -> Problem | None:
    """Parse a problem of GSM8K, as its source renders it; None: it has another form."""
    question, _, solution = text.removeprefix("Question: ").partition("\nAnswer: ")
    lines, mark, answer = solution.partition("#### ")
    steps = tuple(line for each in re.sub(r"<<.*?>>", "", lines).splitlines() if (line := each.strip()))
    calculations = tuple((int(a), operation, int(b)) for a, operation, b, _ in CALCULATION.findall(lines))
    return Problem(question.strip(), steps, answer.strip(), calculations) if mark and steps else None


@dataclass(frozen=True)
class Passage:
    """A passage of ordinary text. `sentences` are its sentences, three or more."""

    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole passage."""
        return " ".join(self.sentences)


def cut_passage(text: str, random: Random) -> Passage | None:
    """Cut a passage of whole paragraphs out of a text; None if none is found at the places that are drawn."""
    for _ in range(TRIES):
        start = text.find("\n\n", int(random.integers(0, max(1, len(text) - 200))))
        words: list[str] = []
        for paragraph in text[start : start + 4000].split("\n\n")[1:-1] if start >= 0 else []:
            words += paragraph.split()
            if len(words) >= PASSAGE_WORDS[0]:
                break
        sentences = tuple(SENTENCE_END.split(" ".join(words)))
        well_formed = all(
            re.fullmatch(r"""["'“]?[A-Z].*[.!?]["'”]?""", each) and each.count(" ") > 3 for each in sentences
        )
        well_formed &= " ".join(words).count('"') % 2 == 0
        if PASSAGE_WORDS[0] <= len(words) <= PASSAGE_WORDS[1] and len(sentences) > 2 and well_formed:
            return Passage(sentences)
    return None


def has_passages(text: str) -> bool:
    """Return whether passages are found in a text. In one without paragraphs they would be looked for without end."""
    random = np.random.default_rng(0)
    return any(cut_passage(text, random) for _ in range(LOOKS))


class Conversation:
    """A conversation that is being drawn.

    Args:
        problems: Problems of the split.
        texts: Texts of the split that passages are cut from.
        split: Decides the wordings.
        random: Generator of everything that is drawn.
    """

    def __init__(self, problems: Sequence[Problem], texts: Sequence[str], split: str, random: Random) -> None:
        self.problems, self.texts, self.random = problems, texts, random
        self.wordings = "train" if split == "train" else "other"
        self.said: list[Problem | Passage] = []

    def draw(self) -> tuple[Message, ...]:
        """Draw the messages; none if there is neither a problem nor a passage."""
        pairs: list[Pair] = []
        count = int(self.random.integers(EXCHANGES[0], EXCHANGES[1] + 1))
        for _ in range(TRIES * count):  # a try may find nothing, or what has been asked
            pair = (self._refer_back() if self.said and self.random.random() > NEW else None) or self._new()
            if pair and pair not in pairs:
                pairs.append(pair)
            if len(pairs) == count:
                break
        return tuple(
            message for user, assistant in pairs for message in (Message("user", user), Message("assistant", assistant))
        )

    def _new(self) -> Pair | None:
        """Pose a problem or paste a passage, as often the one as the other where there are both."""
        if self.problems and (not self.texts or self.random.random() < 0.5):
            problem = self.problems[int(self.random.integers(len(self.problems)))]
            self.said.append(problem)
            solution = "\n".join([*problem.steps, f"The answer is {problem.answer}."])
            return self._worded("problem", question=problem.question, solution=solution)
        passage = (
            cut_passage(self.texts[int(self.random.integers(len(self.texts)))], self.random) if self.texts else None
        )
        if passage is None:
            return None
        self.said.append(passage)
        return self._worded(
            "passage",
            passage=passage.text,
            first=passage.sentences[0],
            last=passage.sentences[-1],
            opening=_opening(passage.text),
        )

    def _refer_back(self) -> Pair | None:
        """Ask for something that was said before; None: there is nothing of the kind that was drawn."""
        item = self.said[int(self.random.integers(len(self.said)))]
        if isinstance(item, Problem):
            return [self._final, self._given, self._step, self._other_number][int(self.random.integers(4))](item)
        return [self._after, self._after, self._end, self._opening][int(self.random.integers(4))](item)

    def _final(self, problem: Problem) -> Pair:
        return self._worded("final", opening=_opening(problem.question), answer=problem.answer)

    def _given(self, problem: Problem) -> Pair | None:
        sentences = [each for each in SENTENCE_END.split(problem.question) if len(NUMBER.findall(each)) == 1]
        if not sentences:
            return None
        sentence = sentences[int(self.random.integers(len(sentences)))]
        number = NUMBER.findall(sentence)[0]
        return self._worded("given", gapped=NUMBER.sub("___", sentence), number=number, sentence=sentence)

    def _step(self, problem: Problem) -> Pair:
        return self._worded("step", opening=_opening(problem.question), step=problem.steps[0])

    def _other_number(self, problem: Problem) -> Pair | None:
        if not problem.calculations:
            return None
        first, operation, second = problem.calculations[int(self.random.integers(len(problem.calculations)))]
        number = first + int(self.random.integers(1, 10))
        result = {"+": number + second, "-": number - second, "*": number * second}[operation]
        old, new = (f"{each} {operation} {second}" for each in (first, number))
        return self._worded("other_number", old=old, new=new, first=first, number=number, result=result)

    def _after(self, passage: Passage) -> Pair:
        number = int(self.random.integers(len(passage.sentences) - 1))
        return self._worded("after", before=passage.sentences[number], sentence=passage.sentences[number + 1])

    def _end(self, passage: Passage) -> Pair:
        words = passage.sentences[int(self.random.integers(len(passage.sentences)))].split()
        half = max(3, len(words) // 2)
        return self._worded("end", beginning=" ".join(words[:half]), rest=" ".join(words[half:]))

    def _opening(self, passage: Passage) -> Pair:
        closing = " ".join(passage.text.split()[-OPENING:])
        return self._worded("opening", closing=closing, first=passage.sentences[0])

    def _worded(self, move: str, **values: Any) -> Pair:
        """Fill a wording of a move."""
        forms = FORMS[move][self.wordings]
        user, assistant = (part.format(**values) for part in forms[int(self.random.integers(len(forms)))])
        return user, assistant


def _opening(text: str) -> str:
    """Return the first words of a text."""
    return " ".join(text.split()[:OPENING])
