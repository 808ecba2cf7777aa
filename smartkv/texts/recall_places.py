"""Facts in the three kinds of text, as they stand in it, and the places in a window at which they are at home.

In books a fact stands between two sentences, in code between two statements of the file, in a conversation between two
exchanges, in the model's own chat template.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from smartkv.texts.chat_format import ChatFormat
from smartkv.texts.documents import Document, Message
from smartkv.texts.facts import CODE, TEXTS, Fact, draw_fact, draw_fact_of, gap

RESTATED = 0.4  # share of the questions in books that repeat the statement up to its answer
# What begins a statement of a file after an empty line; the first pattern that matches twice or more is used.
TOP_LEVEL = (
    r"(?<=\n\n)(?=(?:async )?def \w+\(|class \w+|@\w|import \w|from [\w.]+ import |[A-Za-z_][\w.]*(?:: [^=\n]+)? = "
    r"|(?:if|for|while|with) [^\n]*:\n|try:\n|# )",
    r"(?<=\n\n)(?=\S)",
    r"(?<=\n)(?=[^\s)\]}])",
    r"(?<=\n)",
)
PLACES = 4  # fewest places of a window in code and conversations, if the source has enough of such windows
CLOSING = " \"'`)]}|.,;:!?"  # what is no part of an answer at its end
WHOLE = 0.8  # share of a text that must stay when it is cut back to its last empty line or exchange
Random = np.random.Generator


class Books:
    """Facts in ordinary text, between two sentences.

    Args:
        tokenizer: Tokenizer of the model.
    """

    later = False  # whether a question stands at a later place than its fact, and is the only one of its kind

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def draw(self, split: str, random: Random) -> Fact:
        """Draw a fact in a form of the split."""
        return draw_fact(split, random)

    def stated(self, fact: Fact) -> str:
        """Return the text that states a fact."""
        return f" {fact.statement} "

    def asked(self, fact: Fact, split: str, random: Random) -> str:
        """Return the text that asks for a fact and answers."""
        asked = str(random.choice(TEXTS["asked"][split])).format(question=fact.question, answer=fact.answer)
        if random.random() < RESTATED and fact.answer in fact.statement:  # the form that small models answer best
            asked = f"\n\n{fact.statement[: fact.statement.rindex(fact.answer) + len(fact.answer)]}\n\n"
        return asked

    def fits(self, body: list[int]) -> bool:
        """Return whether a window's ids have enough places."""
        return True

    def joined(self, documents: Iterable[Document], window: int) -> Iterable[Document]:
        """Return the documents from which windows of so many tokens are cut."""
        return documents

    def united(self, body: list[int]) -> list[int]:
        """Return a window's ids as one text, which a question at its end refers to."""
        return body

    def closed(self, body: list[int]) -> list[int]:
        """Return a text's ids up to where a question can follow."""
        return body

    def passage_start(self, text: list[int], start: int) -> int:
        """Return the position from which a passage is repeated. `start` is one that was drawn."""
        return start

    def again(self, passage: list[int], split: str) -> str | None:
        """Return the request to repeat a passage, which follows. None: the kind of text has no such request."""
        return f"\n\n{TEXTS['again'][split].format(opening=self.tokenizer.decode(passage[:6]))}\n"

    def places(self, body: list[int]) -> np.ndarray:
        """Return the positions in a window's ids at which a fact is at home, ascending, at least one."""
        ids = sorted(set(body))
        texts = self.tokenizer.batch_decode([[number] for number in ids])
        ends = {number for number, text in zip(ids, texts, strict=True) if text.endswith((".", "!", "?", "\n"))}
        return np.asarray([0, *(position + 1 for position, number in enumerate(body) if number in ends), len(body)])


class Code(Books):
    """Facts in code, between two statements of the file."""

    later = True

    def draw(self, split: str, random: Random) -> Fact:
        """Draw a fact in a form of the split."""
        return draw_fact_of("code", split, random)

    def stated(self, fact: Fact) -> str:
        """Return the lines that define a value or a name."""
        return f"{fact.statement}\n\n\n"

    def question_and_answer(self, fact: Fact) -> tuple[str, str]:
        """Return the later code up to the answer, and the answer with the space before it.

        Quotes and brackets at the answer's end are left out: in many vocabularies they are one token with what follows.
        """
        lead = fact.question.rstrip(" ")
        return lead, (" " if lead != fact.question else gap(lead)) + fact.answer.rstrip(CLOSING)

    def closing(self, fact: Fact) -> str:
        """Return what `question_and_answer` leaves out at the answer's end."""
        return fact.answer[len(fact.answer.rstrip(CLOSING)) :]

    def asked(self, fact: Fact, split: str, random: Random) -> str:
        """Return the later lines that need the value or the name."""
        return "".join(self.question_and_answer(fact)) + f"{self.closing(fact)}{fact.after}\n\n\n"

    def closed(self, body: list[int]) -> list[int]:
        """Return the ids of code up to its last empty line; up to its last line where that would cut off too much."""
        text, starts = self._text(body)
        empty: list[int] = self.tokenizer("\n\n\n", add_special_tokens=False)["input_ids"]
        for pattern, least in ((r"\n[ \t]*\n+", WHOLE * len(body)), (r"\n", 1)):
            for match in reversed(list(re.finditer(pattern, text))):
                end = starts.get(match.end() if least > 1 else -1, 0)
                start = starts.get(match.start(), 0)  # where the indentation behind it is of the same token
                if max(end, start) >= least:
                    return body[:end] if end else [*body[:start], *empty]
        return [*body, *empty]

    def passage_start(self, text: list[int], start: int) -> int:
        """Return the position of the first line that begins at `start` or later; `start` where none does."""
        content, starts = self._text(text)
        lines = _at_tokens((match.start() for match in re.finditer(r"(?<=\n)(?=[^\n])", content)), starts)
        return next((line for line in lines if line >= start), start)

    def again(self, passage: list[int], split: str) -> str | None:
        """Return the comment that announces a copy of some lines, which follow."""
        first = next((line.strip() for line in str(self.tokenizer.decode(passage)).splitlines() if line.strip()), "")
        return f"\n\n\n{CODE['again'][split].format(opening=first)}\n" if first and split in CODE["again"] else None

    def places(self, body: list[int]) -> np.ndarray:
        """Return the positions at which a statement of the file begins; in its absence those of lines."""
        text, starts = self._text(body)
        found: list[int] = []
        for pattern in TOP_LEVEL:
            found = _at_tokens((match.start() for match in re.finditer(pattern, text)), starts)
            if len(found) > 1:
                break
        return np.asarray(found or [len(body)])

    def fits(self, body: list[int]) -> bool:
        """Return whether a window has several statements of the file, and not parts of a single class alone."""
        text, starts = self._text(body)
        return len(_at_tokens((match.start() for match in re.finditer(TOP_LEVEL[0], text)), starts)) >= PLACES

    def _text(self, body: list[int]) -> tuple[str, dict[int, int]]:
        """Return the ids as text, and for each place in it where a token begins the token's position."""
        ids = sorted(set(body))
        texts = dict(zip(ids, self.tokenizer.batch_decode([[number] for number in ids]), strict=True))
        starts, length = dict[int, int](), 0
        for position, number in enumerate(body):
            starts[length] = position
            length += len(texts[number])
        return "".join(texts[number] for number in body), starts


class Chat(Code):
    """Facts in conversations, between two exchanges.

    Args:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self.format = ChatFormat(tokenizer)

    def draw(self, split: str, random: Random) -> Fact:
        """Draw a fact in a form of the split."""
        return draw_fact_of("chat", split, random)

    def stated(self, fact: Fact) -> str:
        """Return the exchange in which the user gives a value."""
        return self.format.exchange(fact.statement, fact.reply)

    def question_and_answer(self, fact: Fact) -> tuple[str, str]:
        """Return the user's question with the assistant's words up to the value, and the value."""
        lead = fact.lead.rstrip(" ")
        question = f"{self.format.user_start}{fact.question}{self.format.assistant_start}{lead}"
        return question, (" " if lead != fact.lead else gap(lead)) + fact.answer.rstrip(CLOSING)

    def asked(self, fact: Fact, split: str, random: Random) -> str:
        """Return the exchange in which the user asks for the value."""
        point = "" if fact.answer.endswith((".", "!", "?")) else "."
        return "".join(self.question_and_answer(fact)) + self.closing(fact) + point + self.format.assistant_end

    def joined(self, documents: Iterable[Document], window: int) -> Iterator[Document]:
        """Join conversations to longer ones of a window's tokens: one user asks what the same user has said."""
        messages: list[Message] = []
        names: list[str] = []
        length = 0
        for document in documents:
            names.append(document.id)
            messages = _continued(messages, document.messages)
            length += sum(len(self.tokenizer(message.content)["input_ids"]) for message in document.messages)
            if length >= window:
                yield Document("+".join(names), document.text, tuple(messages))
                messages, names, length = [], [], 0
        if names:
            yield Document("+".join(names), "", tuple(messages))

    def closed(self, body: list[int]) -> list[int]:
        """Return the ids of a conversation up to its last exchange, or with the answer at its end closed."""
        last = int(self.places(body)[-1])
        if len(body) > last > WHOLE * len(body):
            return body[:last]
        return [*body, *self.tokenizer(self.format.assistant_end, add_special_tokens=False)["input_ids"]]

    def united(self, body: list[int]) -> list[int]:
        """Return a window's ids as one conversation: what opens further ones is left out."""
        opening = self.tokenizer(self.format.opening, add_special_tokens=False)["input_ids"]
        ids, position = list[int](), 0
        while position < len(body):
            opens = bool(opening) and position > 1 and body[position : position + len(opening)] == opening
            ids += [] if opens else [body[position]]  # one at the start, perhaps behind a BOS token, stays
            position += len(opening) if opens else 1
        return ids

    def again(self, passage: list[int], split: str) -> str | None:
        """Return None: the source `chat` has such requests of its own."""
        return None

    def places(self, body: list[int]) -> np.ndarray:
        """Return the positions at which a user's turn begins; in its absence the end."""
        text, starts = self._text(body)
        return np.asarray(_at_tokens(self.format.user_turns(text), starts) or [len(body)])

    def fits(self, body: list[int]) -> bool:
        """Return whether a window has several turns of a user."""
        return len(self.places(body)) >= PLACES


KINDS: dict[str, type[Books]] = {"books": Books, "code": Code, "chat": Chat}


def _continued(messages: list[Message], others: tuple[Message, ...]) -> list[Message]:
    """Return a conversation with another one behind it, so that users and assistants still take turns."""
    if not messages:
        return list(others)
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]
    following = [message for message in others if message.role != "system"]
    while following and following[0].role != "user":
        following = following[1:]
    return [*messages, *following]


def _at_tokens(places: Iterable[int], starts: dict[int, int]) -> list[int]:
    """Return the positions of the tokens that begin at places in the text; other places are left out."""
    return sorted({starts[place] for place in places if place in starts})
