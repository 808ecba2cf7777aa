"""Articles of WikiText, as prose: its lines are put together, and what its tokenisation tore apart is joined again."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

UNKNOWN = "<unk>"  # a rare word, in the form of WikiText whose words are counted
_HEADING = re.compile(r"((?:= )+)([^=\s].*?)((?: =)+)")
_DECADE = re.compile(r"\d0s")  # the ' 90s
_STOPS = (".", "?", "!")
_CLAUSES = re.compile("that|where|when|while|whether|if|who|which|and|but|than|as|because|though|although")
_SMALL = re.compile(  # words that need another beside them
    "an?|the|this|that|these|those|his|her|its|their|our|my|your|whom?|whose|which|what|when|where|while|whether|if|s?he"
    "|it|they|we|you|i|him|them|us|and|n?or|but|than|as|so|not|no|to|of|in|on|at|by|for|from|with|without|into|onto|over"
    "|under|about|after|before|between|among|against|during|through|until|upon|within|towards?|per|via|is|are|was|were|be"
    "|been|being|has|have|had|having|do|does|did|will|would|can|could|may|might|shall|should|must|also|then|there|called"
    "|named|known|very|more|most|only|both|each|every|such"
)
_CLOSING = ".?!\"'”’)]"
_ATTACHED = frozenset([",", ";", ":", ")", "]", "}", "%", "”", "’", "...", "…", "′", "″", ".", "?", "!"])  # to the left
_OPENING = frozenset(["(", "[", "{", "“", "‘", "$", "£", "€", "¥", "₱", "₩", "#"])  # to the right
_JOINED = {"@-@": "-", "@,@": ",", "@.@": ".", "/": "/", "⁄": "⁄", "°": "°", "‑": "‑"}  # on both sides
_DOLLARS = frozenset(["US", "A", "AU", "C", "CA", "NZ", "HK", "S"])  # before $


def articles(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Put the lines of WikiText together to articles.

    The title becomes `# Title`, a heading `## Heading`, one more # for each level; a blank line stands between
    paragraphs. Unknown words are left out, and so are sentences that need them and headings without text below them.

    Args:
        rows: Records with a line each in the field `text`, in the order of the file.

    Yields:
        Records with the fields `title`, made unique by a number, and `text`.
    """
    seen: Counter[str] = Counter()
    title, lines, before = "", list[str](), ""
    for row in rows:
        line = row["text"].strip()
        heading = _heading(line)
        if heading and heading[0] == 1 and not _breaks_off(before):
            yield from _article(title, lines, seen)
            title, lines = heading[1], []
        if line:
            lines.append(line)
        before = line
    yield from _article(title, lines, seen)


def prose(line: str) -> str:
    """Return a tokenised line as it was written: `5 @.@ 5 m ( 18 ft )` becomes `5.5 m (18 ft)`."""
    text, space = "", False  # text so far; whether a space comes before the next token
    words = line.split()
    quoted = single = False
    for number, word in enumerate(words):
        following = words[number + 1] if number + 1 < len(words) else ""
        before, after = text[-1:], following[:1]
        left, right = word in _ATTACHED, word in _OPENING
        if word in _JOINED or (word in ("–", ":") and before.isdigit() and after.isdigit()):
            left, right = True, True
        elif word == '"':
            left, right = quoted, not quoted
            quoted = not quoted
        elif word == "'":
            # the end of a plural's genitive, or one of a pair of quotation marks
            decade = _DECADE.fullmatch(following) is not None
            opens = decade or (not single and "'" in words[number + 1 :] and before != "s")
            left, right, single = not opens, opens, single if decade else opens
        elif word[0] == "'":  # didn 't, Du Fu 's, d 'affaires
            left = word[1:2].isalpha() and before.isalpha()
        elif word == "$":
            left = number > 0 and words[number - 1] in _DOLLARS
        text += (" " if space and not left else "") + _JOINED.get(word, word)
        space = not right
    return text


def _heading(line: str) -> tuple[int, str] | None:
    """Return the level of a heading and its words, None for another line. A title has level 1."""
    match = _HEADING.fullmatch(line)
    if match is None or len(match[1]) != len(match[3]):
        return None
    return len(match[1]) // 2, match[2]


def _breaks_off(line: str) -> bool:
    """Whether a line ends amid a sentence. A formula follows then, which may look like a title."""
    return " . " in line and line[-1] not in _CLOSING


def _article(title: str, lines: list[str], seen: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the article, unless it has no text."""
    parts: list[str] = []
    waiting: list[tuple[int, str]] = []  # headings whose text has not come
    for line in lines:
        if heading := _heading(line):
            level, words = heading
            waiting = [each for each in waiting if each[0] < level]
            name = prose(_without_unknown(words))
            waiting.append((level, f"{'#' * level} {name}" if name else ""))
        elif any(map(str.isalnum, text := prose(_without_unknown(line)))):
            parts += [heading for _, heading in waiting if heading] + [text]
            waiting = []
    if parts:
        name = prose(title)  # with its unknown words: an article without a name has an id too
        seen[name] += 1
        yield {
            "title": name if seen[name] == 1 else f"{name} ({seen[name]})",
            "text": "\n\n".join(parts),
        }


def _without_unknown(line: str) -> str:
    """Return a tokenised line without its unknown words, and without the sentences that need them."""
    if UNKNOWN not in line:
        return line
    kept = [sentence for sentence in _sentences(line.split()) if not _needs_unknown(sentence)]
    return " ".join(word for sentence in kept for word in sentence if word != UNKNOWN)


def _sentences(words: list[str]) -> Iterator[list[str]]:
    """Yield the words of each sentence. A quotation and a bracket are not divided."""
    sentence, quoted, depth = list[str](), False, 0
    for word in words:
        sentence.append(word)
        quoted ^= word == '"'
        depth = max(0, depth + (word in ("(", "“")) - (word in (")", "”")))
        last = sentence[-2:-1] if word in ('"', ")", "”") else [word]
        if not quoted and not depth and last and last[0] in _STOPS:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _needs_unknown(words: list[str]) -> bool:
    """Whether an unknown word is no attribute of what follows and no part of a name, judged by the words beside it."""
    known = [word for number, word in enumerate(words) if word != UNKNOWN or words[number - 1 : number] != [UNKNOWN]]
    for before, word, after in zip(["", *known], known, [*known[1:], ""], strict=False):
        if word == UNKNOWN and (
            (_is_small(after) and (_is_small(before) or before.islower()))
            or before.startswith("@")
            or after.startswith(("@", "'"))
            or (after.islower() and (not before[:1].isalnum() or _CLAUSES.fullmatch(before.lower())))
        ):
            return True
    return False


def _is_small(word: str) -> bool:
    return not word[:1].isalnum() or _SMALL.fullmatch(word.lower()) is not None
