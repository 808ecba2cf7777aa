"""Conversations in the chat template of a model, and as plain lines."""

import pytest
from transformers import PreTrainedTokenizerFast

from smartkv.errors import SmartKVError
from smartkv.texts.chat_format import ChatFormat
from smartkv.texts.documents import Message
from tests.models import tiny_tokenizer

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}{{ raise_exception('no system messages') }}{% endif %}{% endfor %}"
)
TALK = [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Bye"), Message("assistant", "See you")]


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.chat_template = template
    return made


def test_a_conversation_is_rendered_as_the_tokenizer_does() -> None:
    made = tokenizer(CHATML)
    expected = made.apply_chat_template([{"role": m.role, "content": m.content} for m in TALK], tokenize=False)
    assert ChatFormat(made).render(TALK) == expected and "Be kind" in expected


@pytest.mark.parametrize("template", [CHATML, INST, None])
def test_exchanges_make_up_a_conversation(template: str | None) -> None:
    made = ChatFormat(tokenizer(template))
    assert made.plain == (template is None)
    assert made.render(TALK) == made.opening + made.exchange("Hi", "Hello") + made.exchange("Bye", "See you")


@pytest.mark.parametrize("template", [CHATML, INST, None])
def test_the_turns_of_the_user_are_found(template: str | None) -> None:
    made = ChatFormat(tokenizer(template))
    text = made.render(TALK)
    starts = [len(made.opening), len(made.opening + made.exchange("Hi", "Hello"))]
    assert made.user_turns(text) == starts
    assert made.user_turns("A text in which User: and user stand, but no turn.") == []


def test_without_a_template_turns_are_plain_lines() -> None:
    lines = ChatFormat(tokenizer(None)).render([Message("system", "Be brief"), *TALK[:2]])
    assert lines == "System: Be brief\nUser: Hi\nAssistant: Hello\n"


def test_a_template_that_tells_the_date_renders_the_same_every_day() -> None:
    made = ChatFormat(tokenizer("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}\n" + CHATML))
    assert made.render(TALK).startswith("1 January 2025\n")


def test_what_a_template_refuses_is_told_in_a_line() -> None:
    with pytest.raises(SmartKVError, match=r"refuses a conversation of system, user \(.*no system messages"):
        ChatFormat(tokenizer(INST)).render([Message("system", "Be brief"), Message("user", "Hi")])


def test_a_template_that_leaves_out_messages_is_refused() -> None:
    with pytest.raises(SmartKVError, match="leaves out messages"):
        ChatFormat(tokenizer("{{ messages[-1]['content'] }}"))
