"""Terminal input and output of a chat: streamed answers, a status line below them, and Ctrl-C."""

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

EVERY = 0.1  # seconds between two drawings of the status line


def is_terminal() -> bool:
    """Return whether stdout understands control codes."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Answer(TextStreamer):
    """Streamer that prints an answer word by word.

    On a terminal its last row shows `status()` while the answer runs. Elsewhere only the text is written, without
    control codes.

    Example:
        with Answer(tokenizer, status) as answer:
            model.generate(ids, streamer=answer)

    Args:
        tokenizer: the model's.
        status: returns the line for the last row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, status: Callable[[], str]) -> None:
        """Look whether stdout is a terminal."""
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.status, self.live, self.drawn = status, is_terminal(), 0.0
        self.size: os.terminal_size | None = None

    def __enter__(self) -> "Answer":
        self._draw(now=True)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.size is not None:  # the whole screen scrolls again
            self._write(f"\x1b7\x1b[r\x1b[{self.size.lines};1H\x1b[2K\x1b8")

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt at the first call, and then one token a call."""
        super().put(value)
        self._draw()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print whole words, and a line end after the answer."""
        self._write(text + ("\n" if stream_end else ""))

    def _draw(self, now: bool = False) -> None:
        if not self.live or (time.monotonic() - self.drawn < EVERY and not now):
            return
        size = os.get_terminal_size(sys.stdout.fileno())
        if size.lines < 3:
            return
        if size != self.size:  # from now on only the rows above the last one scroll
            self._write(f"\n\x1b7\x1b[1;{size.lines - 1}r\x1b8\x1b[1A")
            self.size = size
        self._write(f"\x1b7\x1b[{size.lines};1H\x1b[2K\x1b[2m{self.status()[: size.columns]}\x1b[0m\x1b8")
        self.drawn = time.monotonic()

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class Interruptible(StoppingCriteria):
    """Stopping criterion that ends an answer at Ctrl-C, after the current token.

    All layers have then read the same tokens. A second Ctrl-C ends the program.

    Attributes:
        interrupted: Ctrl-C was pressed.
        times: when each token came, seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        """Start without an interruption."""
        self.interrupted = False
        self.times: list[float] = []

    def __enter__(self) -> "Interruptible":
        self.before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return whether to stop, bool `[batch]`."""
        self.times.append(time.perf_counter())
        return torch.full((len(input_ids),), self.interrupted, device=input_ids.device)

    @property
    def ms_per_token(self) -> float | None:
        """Milliseconds a token after the first, whose time includes the prompt. None: there was no second token."""
        if len(self.times) < 2:
            return None
        return 1000 * (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def ask() -> str | None:
    """Return the user's next line, or None at an empty one and at the end of the input; Ctrl-C asks again."""
    while True:
        try:
            return input("> " if is_terminal() else "").strip() or None
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n(an empty line or Ctrl-D ends)", file=sys.stderr)
