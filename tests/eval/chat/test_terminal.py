"""The terminal: words as they come, the line below them, Ctrl-C, and the user's lines."""

import io
import os
import pty
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.chat.conversation import RecordingCache
from eval.chat.terminal import Answer, ask
from smartkv.models.backbone import load_tokenizer

PROMPT = "the river ran down to an old mill where nobody had lived since winter"
STATUS = r"KV [\d.]+ [KM]iB of [\d.]+ [KM]iB full \(\d+ %\) · [\d,]+ tokens( · \d+ ms/token)?"


def lines(monkeypatch: pytest.MonkeyPatch, *typed: str) -> None:
    """What the user types."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))


def test_ctrl_c_stops_the_answer_and_not_the_program(run: Any, chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = RecordingCache.attend, []

    def attend(self: RecordingCache, layer: int, step: Any) -> Any:
        calls.append(layer)
        if len(calls) == 11:  # in the middle of the fifth token's pass
            signal.raise_signal(signal.SIGINT)
        return real(self, layer, step)

    monkeypatch.setattr(RecordingCache, "attend", attend)
    lines(monkeypatch, "hello", "again")
    before = signal.getsignal(signal.SIGINT)
    written = run(backbone=chatty, chat="true")
    assert [turn["stopped"] for turn in written["turns"]] == ["interrupted", "length"]
    assert written["turns"][0]["new_tokens"] < 8 < written["turns"][1]["new_tokens"]
    assert signal.getsignal(signal.SIGINT) is before


def test_words_are_written_as_they_come(tiny_backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(str(tiny_backbone))
    shown = []
    with Answer(tokenizer, lambda: "") as answer:
        answer.put(torch.tensor([[1, 2, 3]]))  # the prompt
        for token in tokenizer("one two three")["input_ids"]:
            answer.put(torch.tensor([token]))
            shown.append(capsys.readouterr().out)
        answer.end()
    # by whole words up to transformers 5.23, by characters since
    assert len([text for text in shown if text]) > 1 and "one" in "".join(shown)
    assert "".join(shown) + capsys.readouterr().out == "one two three\n"


def test_a_terminal_shows_what_the_cache_holds_below_the_text(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    read: list[bytes] = []

    def collect() -> None:
        while True:
            try:
                read.append(os.read(master, 4096))
            except OSError:  # the other end was closed
                return

    reader = threading.Thread(target=collect)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("eval.chat.terminal.EVERY", 0)
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((80, 24)))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        written = run(prompt=PROMPT, policy="all-gated")
        monkeypatch.undo()
    reader.join()
    os.close(master)
    shown = b"".join(read).decode()
    assert "\x1b[1;23r" in shown and shown.rindex("\x1b[r") > shown.rindex("\x1b[1;23r"), "the last row stays set aside"
    assert re.search(rf"\x1b\[24;1H\x1b\[2K\x1b\[2m{STATUS}", shown)
    plain = re.sub(r"\x1b7.*?\x1b8|\x1b\[1A", "", shown, flags=re.S).replace("\r\n", "\n")
    assert plain.strip("\n") == written["turns"][0]["answer"].replace("\r\n", "\n").strip("\n")


def test_an_empty_line_and_the_end_of_the_input_end_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    lines(monkeypatch, "  hello ", "")
    assert [ask(), ask(), ask()] == ["hello", None, None]
