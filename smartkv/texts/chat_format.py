"""Conversations as a model reads them: in its own chat template, or as plain lines where its tokenizer has none."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from smartkv.errors import SmartKVError
from smartkv.texts.documents import Message

PLAIN = {"system": "System: ", "user": "User: ", "assistant": "Assistant: "}
DATE = "1 January 2025"  # for templates that tell the date: a text must not depend on the day of the run
CLOCK = "{%- macro strftime_now(format) -%}" + DATE + "{%- endmacro -%}"
PROBE = tuple(f"Message{number}" for number in range(6))


class ChatFormat:
    """The format in which a model reads conversations.

    Args:
        tokenizer: Tokenizer of the model.

    Attributes:
        plain: Whether the tokenizer has no chat template, so that turns are lines `User: …` and `Assistant: …`.
        opening: What stands before the first message, such as a system message of the template's own.
        user_start: What stands before a user's message.
        assistant_start: What stands between a user's message and the answer.
        assistant_end: What stands after an answer.

    Raises:
        SmartKVError: The chat template leaves out or changes messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.plain = not getattr(tokenizer, "chat_template", None)
        roles = ("user", "assistant") * 3
        text = self.render([Message(role, content) for role, content in zip(roles, PROBE, strict=True)])
        between = re.fullmatch("(.*)".join(["", *PROBE, ""]), text, re.DOTALL)
        if between is None:
            raise SmartKVError("the model's chat template leaves out messages of a conversation: give it another one")
        head, self.assistant_start, turn, *_, end = between.groups()
        self.assistant_end = end if turn.startswith(end) else ""
        self.user_start = turn.removeprefix(self.assistant_end)
        self.opening = head.removesuffix(self.user_start)

    def render(self, messages: Sequence[Message]) -> str:
        """Return a conversation as text. The template may put a system message of its own before it.

        Raises:
            SmartKVError: The template refuses the conversation, such as two messages of one role in a row.
        """
        if self.plain:
            return "".join(f"{PLAIN[message.role]}{message.content}\n" for message in messages)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": message.role, "content": message.content} for message in messages],
                    chat_template=CLOCK + self.tokenizer.get_chat_template(),
                    tokenize=False,
                    date_string=DATE,
                )
            )
        except Exception as error:  # a template is a program of its own, and raises what it likes
            roles = ", ".join(message.role for message in messages[:4])
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SmartKVError(
                f"the model's chat template refuses a conversation of {roles}{' …' if len(messages) > 4 else ''} "
                f"({reason}): leave out what it does not know"
            ) from error

    def exchange(self, user: str, assistant: str) -> str:
        """Return a user's message and its answer, as they stand between two exchanges of a conversation."""
        return f"{self.user_start}{user}{self.assistant_start}{assistant}{self.assistant_end}"

    def user_turns(self, text: str) -> list[int]:
        """Return the positions in a text at which a user's message begins, before its marker.

        Args:
            text: A part of rendered conversations.
        """
        marker = re.escape(self.user_start.strip())
        if not marker:
            return []
        return [match.start() for match in re.finditer(rf"^{marker}" if self.plain else marker, text, re.MULTILINE)]
