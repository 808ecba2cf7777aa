"""Where facts are at home in books, code and conversations, and what they look like there."""

import ast
import re

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from smartkv.shards.manifest import SPLITS
from smartkv.texts.chat_format import ChatFormat
from smartkv.texts.documents import Document, Message
from smartkv.texts.facts import FORMS, all_slots, fill
from smartkv.texts.recall import RecallPacker
from smartkv.texts.recall_places import KINDS, Chat, Code
from tests.models import tiny_tokenizer
from tests.smartkv.texts.test_chat_format import CHATML

WINDOW = 3000


def chatml() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZER = chatml()  # a token a byte
FUNCTION = "@cached\ndef area_{n}(width, height):\n    # multiply\n\n    return width * height\n\n\n"
CODE = "import math\n\n\n" + "".join(FUNCTION.format(n=number) for number in range(100))
TALK = tuple(
    Message(role, f"{text} {number}.")
    for number in range(60)
    for role, text in (("user", "Tell me about number"), ("assistant", "There is little to say about the number"))
)


def windows(kind: str, split: str, document: Document, count: int = 8) -> list[str]:
    packer = RecallPacker(TOKENIZER, WINDOW, 1, [3], split, kind)
    documents = [Document(str(n), document.text, document.messages) for n in range(2 * count)]
    found = packer.pack(documents, count)
    assert all(window.tokens.shape == (WINDOW,) and window.tokens.dtype == np.int32 for window in found)
    return [str(TOKENIZER.decode(window.tokens.tolist())) for window in found]


@pytest.mark.parametrize("split", SPLITS)
def test_code_with_facts_is_still_code(split: str) -> None:
    for text in windows("code", split, Document("a", CODE)):
        whole = text[text.index("\n@cached") : text.rindex("\n@cached")]  # the window begins and ends in a function
        found = {node.name for node in ast.parse(whole).body if isinstance(node, ast.FunctionDef)}
        assert len(found & {f"area_{n}" for n in range(100)}) > 5


def test_facts_of_code_are_defined_before_they_are_needed() -> None:
    numbers = 0
    for text in windows("code", "train", Document("a", CODE)):
        for match in re.finditer(r"assert (\w+) == (\S+)\n", text):
            assert re.search(rf"^{match[1]} = ", text[: match.start()], re.MULTILINE)
            numbers += 1
    assert numbers > 3


@pytest.mark.parametrize("split", SPLITS)
def test_facts_of_conversations_are_exchanges_between_exchanges(split: str) -> None:
    asked = 0
    for text in windows("chat", split, Document("a", "", TALK)):
        whole = text[text.index("<|im_start|>user") :]  # the window may begin within a turn
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", whole, re.DOTALL)
        assert [role for role, _ in turns] == (["user", "assistant"] * len(turns))[: len(turns)]
        leads = [form[3].partition("{")[0] for form in FORMS["chat"][split]]
        for place, (role, content) in enumerate(turns):
            if role == "assistant" and content.startswith(tuple(lead for lead in leads if len(lead) > 8)):
                value = content.rstrip(".").split()[-1]
                asked += any(value in said for role, said in turns[: place - 2] if role == "user")
    assert asked > 6


@pytest.mark.parametrize("kind", ["code", "chat"])
def test_no_two_facts_of_a_window_have_the_same_question(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a later value would contradict the one that is asked for."""
    drawn: list[str] = []
    original = KINDS[kind].stated
    monkeypatch.setattr(KINDS[kind], "stated", lambda self, fact: drawn.append(fact.question) or original(self, fact))
    document = Document("a", CODE) if kind == "code" else Document("a", "", TALK)
    windows(kind, "validation", document, 1)
    assert len(drawn) == len(set(drawn)) == WINDOW // 200


@pytest.mark.parametrize("kind", ["code", "chat"])
@pytest.mark.parametrize("split", SPLITS)
def test_every_form_states_its_answer_and_asks_for_it(kind: str, split: str) -> None:
    made = KINDS[kind](TOKENIZER)
    assert isinstance(made, Code)
    for number, form in enumerate(FORMS[kind][split]):
        fact = fill(kind, form, all_slots(split, np.random.default_rng(number)))
        lead, answer = made.question_and_answer(fact)
        asked = made.asked(fact, split, np.random.default_rng(0))
        assert asked.startswith(lead + answer) and not lead.endswith(" ") and "{{" not in asked
        for part in re.findall(r"[\w.@/-]+", answer):
            assert part in fact.statement, form
        if kind == "code":
            ast.parse(f"{made.stated(fact)}{asked}")


def test_splits_share_no_forms() -> None:
    for kind in ("code", "chat"):
        parts = [{str(form) for form in FORMS[kind][split]} for split in SPLITS]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
        assert len(parts[0]) >= 24 and len(parts[1]) >= 6


def test_code_without_statements_at_its_margin_has_places_at_its_lines() -> None:
    body = TOKENIZER("    if a:\n        b = 1\n        c = 2\n    return b\n")["input_ids"]
    assert [len("    if a:\n")] == Code(TOKENIZER).places(body).tolist()[:1]
    assert Code(TOKENIZER).places(TOKENIZER("one line")["input_ids"]).tolist() == [len("one line")]


def test_a_copy_of_code_begins_with_the_line_that_its_comment_names() -> None:
    found = 0
    for text in windows("code", "train", Document("a", CODE), 12):
        if match := re.search(r"# The code from `(.*)` on, once more:\n(.*)", text, re.DOTALL):
            assert match[2].strip().startswith(match[1]) and match[2] in text[: match.start()]
            found += 1
    assert found > 1


def test_conversations_are_joined_to_one_of_a_window_s_length() -> None:
    system = Message("system", "Be brief")
    talks = [Document(str(n), "", (system, *TALK[2 * n : 2 * n + 2], Message("user", "Wait"))) for n in range(9)]
    joined = list(Chat(TOKENIZER).joined(talks, 200))
    assert [document.id for document in joined] == ["0+1+2", "3+4+5", "6+7+8"]
    assert [m.role for m in joined[0].messages] == ["system", *["user", "assistant"] * 3, "user"]
    assert [m.content for m in joined[0].messages[1:-1]] == [m.content for m in TALK[:6]]


def test_what_opens_further_conversations_is_left_out_of_a_trial() -> None:
    made, form = Chat(TOKENIZER), ChatFormat(TOKENIZER)
    ids = TOKENIZER(form.render(TALK[:2]) + form.render(TALK[2:4]))["input_ids"]
    assert TOKENIZER.decode(made.united(ids)) == form.render(TALK[:4])


def test_a_text_is_closed_where_a_question_can_follow() -> None:
    made, form = Chat(TOKENIZER), ChatFormat(TOKENIZER)
    ids = TOKENIZER(form.render(TALK[:20]) + form.user_start + "Tell")["input_ids"]
    assert TOKENIZER.decode(made.closed(ids)) == form.render(TALK[:20])
    long = TOKENIZER(form.render([TALK[0]])[:-10] + "and so on " * 30)["input_ids"]
    assert TOKENIZER.decode(made.closed(long)).endswith("and so on " + form.assistant_end)
    assert TOKENIZER.decode(Code(TOKENIZER).closed(TOKENIZER(CODE[:300])["input_ids"])).endswith("\n\n")


def test_code_is_closed_where_its_last_empty_line_shares_a_token_with_the_indentation() -> None:
    class Merged(Code):
        def _text(self, body: list[int]) -> tuple[str, dict[int, int]]:
            text, starts = super()._text(body)
            after = text.rindex("\n\n") + 2
            return text, {place: position for place, position in starts.items() if place != after}

    start = "class A:\n    b = 'a long text'\n    c = 'another long text'"
    body = TOKENIZER(f"{start}\n\n    d =")["input_ids"]
    assert TOKENIZER.decode(Code(TOKENIZER).closed(body)) == f"{start}\n\n"
    assert TOKENIZER.decode(Merged(TOKENIZER).closed(body)) == f"{start}\n\n\n"


def test_code_without_an_empty_line_near_its_end_is_closed_at_its_last_line() -> None:
    text = "a = 1\n\n\ndef long():\n" + "    call()\n" * 20
    assert TOKENIZER.decode(Code(TOKENIZER).closed(TOKENIZER(f"{text}    cal")["input_ids"])) == f"{text}\n\n"


def test_windows_with_places_for_facts_go_before_others() -> None:
    methods = "class Long:\n" + "".join(f"    def area_{n}(self):\n        return {n}\n\n" for n in range(300))
    packer = RecallPacker(TOKENIZER, WINDOW, 2, [3], "train", "code")
    found = packer.pack([Document("methods", methods), Document("functions", CODE)], 2)
    assert {packer.documents[window.document[0]] for window in found} == {"functions"}


def test_what_closes_an_answer_is_no_part_of_it() -> None:
    """In many vocabularies a quote and the line's end are one token, which the answer alone would not have."""
    made = Code(TOKENIZER)
    fact = fill("code", ['a = Path("/b/c")', "assert a == Path(", '"/b/c"', ")"], {})
    assert made.question_and_answer(fact) == ("assert a == Path(", '"/b/c')
    assert made.asked(fact, "train", np.random.default_rng(0)) == 'assert a == Path("/b/c")\n\n\n'
