"""A text that one cache reads turn by turn, and what was decided about each of its keys."""

from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from eval.chat.page import UNDECIDED
from eval.chat.terminal import Answer, Interruptible
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.metrics.perplexity import full_cache_bytes
from smartkv.models.backbone import Backbone
from smartkv.policies.capacity import Cap
from smartkv.policies.hybrid import HybridPolicy

QUERIES_AT_ONCE = 128  # for which it is computed what a cap drops
ANSWER = "\ue000"  # stands for an answer in a rendered template: a character that no template writes


class RecordingCache(LifespanCache):
    """A LifespanCache of one row that remembers what it decided, layer by layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorded: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self.rules]

    @torch.no_grad()
    def expiry(self, layer: int, keys: Tensor, position: Tensor, sliding_window: int | None) -> Tensor:
        """As the cache's own; recorded beside what the gates say, also of layers whose rule does not ask them."""
        expiry = super().expiry(layer, keys, position, sliding_window)
        prediction = self._scores_once(layer, keys)
        if prediction is None:
            prediction = torch.full(expiry.shape, torch.nan)
        elif self.gates is not None:
            prediction = self.gates.single_score(prediction)
        self.recorded[layer].append((position[0].cpu(), prediction[0].float().cpu(), expiry[0].cpu()))
        return expiry

    def decisions(self, tokens: int) -> tuple[Tensor, Tensor]:
        """What was decided of the first `tokens` positions.

        Returns:
            Predictions, float32 `[layers, kv_heads, tokens]`, NaN where a layer has no gates or nothing is decided yet;
            the first position whose query does not see a key, int64 of the same shape, `UNDECIDED` there.
        """
        predictions = torch.full((len(self.rules), self.architecture.kv_heads, tokens), torch.nan)
        expiries = torch.full(predictions.shape, UNDECIDED, dtype=torch.int64)
        for layer, parts in enumerate(self.recorded):
            for position, prediction, expiry in parts:
                predictions[layer][:, position] = prediction
                expiries[layer][:, position] = expiry.long()
            read = sum(len(position) for position, *_ in parts)
            cap = self.storage[layer].cap
            if cap is not None:  # follows from expiries and predictions
                seen = expiries[layer, :, :read]
                seen.copy_(_capped(cap, seen, predictions[layer, :, :read].nan_to_num(0)))
        return predictions, expiries


def _capped(cap: Cap, expiry: Tensor, score: Tensor) -> Tensor:
    """Expiries `[kv_heads, tokens]` with what the cap dropped."""
    heads, tokens = expiry.shape
    position, ends = torch.arange(tokens).expand(heads, -1), expiry
    for start in range(0, tokens + 1, QUERIES_AT_ONCE):  # also for the query that comes next
        first, steps = torch.full((heads,), start), min(QUERIES_AT_ONCE, tokens + 1 - start)
        ends = torch.minimum(ends, cap.ends(position, expiry, score if cap.heads > 1 else None, first, steps))
    return ends


@dataclass(frozen=True)
class Turn:
    """What was said: `prompt_tokens` read and `new_tokens` made; `stopped`: end, length or interrupted;
    `ms_per_token`: of the tokens after the first, None where there are none."""

    prompt: str
    answer: str
    prompt_tokens: int
    new_tokens: int
    stopped: str
    ms_per_token: float | None


def encode(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool, first: bool) -> list[int]:
    """The tokens that a turn adds.

    Args:
        chat: by the tokenizer's chat template, up to where the answer begins.
        first: whether the conversation starts here; else an answer stands before, and its closing comes first.

    Raises:
        SmartKVError: no chat template, or one that takes no such conversation.
    """
    if not chat:
        return tokenizer(text)["input_ids"]
    if tokenizer.chat_template is None:
        raise SmartKVError("this model's tokenizer has no chat template: leave chat out to complete a text")
    messages = [{"role": "user", "content": text}]
    if not first:
        messages = [{"role": "user", "content": "…"}, {"role": "assistant", "content": ANSWER}, *messages]
    try:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise SmartKVError(f"the tokenizer's chat template takes no such conversation: {error}") from error
    return tokenizer(rendered if first else rendered.partition(ANSWER)[2], add_special_tokens=False)["input_ids"]


class Conversation:
    """A text and the one cache that reads it; only new tokens are fed.

    Args:
        lm: the model.
        gates: its gates; None for a policy that needs none.
        policy: with nothing open.

    Raises:
        SmartKVError: model, gates and policy do not fit together.
    """

    def __init__(self, lm: Backbone, gates: GateBank | None, policy: HybridPolicy, chat: bool = False) -> None:
        self.lm, self.chat = lm, chat
        self.cache = RecordingCache(lm.model, gates, policy)
        self.ids: list[int] = []
        self.generated: list[bool] = []
        self.turns: list[Turn] = []

    def encode(self, prompt: str, max_new_tokens: int) -> list[int]:
        """The tokens that `prompt` adds.

        Raises:
            SmartKVError: with `max_new_tokens` more they pass the model's positions.
        """
        new = encode(self.lm.tokenizer, prompt, self.chat, first=not self.turns)
        if self.ids and new and new[0] == self.ids[-1] and new[0] in self.lm.tokenizer.all_special_ids:
            new = new[1:]  # the answer was closed by the model itself
        check_room(len(self.ids) + len(new), max_new_tokens, self.lm.architecture.max_positions)
        return new

    @torch.no_grad()
    def say(self, prompt: str, generation: GenerationConfig | None) -> Turn:
        """Read `prompt` and answer it on stdout; None: only read it. Raises as `encode`."""
        most = 0 if generation is None else generation.max_new_tokens
        new = self.encode(prompt, most)
        self.ids += new
        self.generated += [False] * len(new)
        ids = torch.tensor([self.ids], device=self.lm.model.device)
        with Interruptible() as watch, Answer(self.lm.tokenizer, lambda: self.status(watch.ms_per_token)) as answer:
            if generation is not None:
                everything = self.lm.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=self.cache,
                    generation_config=generation,
                    streamer=answer,
                    stopping_criteria=[watch],
                )[0].tolist()
            else:
                unread = ids[:, self.cache.get_seq_length() :]
                self.lm.model.base_model(input_ids=unread, past_key_values=self.cache)
                everything = self.ids
        self.cache.settle()  # so that the latest keys are judged, too
        made = everything[len(self.ids) :]
        self.ids = everything
        self.generated += [True] * len(made)
        text = self.lm.tokenizer.decode(made, skip_special_tokens=True)
        stopped = "interrupted" if watch.interrupted else "length" if len(made) == most else "end"
        self.turns.append(Turn(prompt, text, len(new), len(made), stopped, watch.ms_per_token))
        return self.turns[-1]

    def status(self, ms_per_token: float | None) -> str:
        """What the cache holds beside a full one, in a line."""
        tokens = self.cache.get_seq_length()
        if not tokens:
            return f"reading {len(self.ids):,} tokens …"
        held, full = self.cache.storage_bytes, full_cache_bytes(self.lm.model, tokens)
        line = f"KV {_size(held)} of {_size(full)} full ({held / full:.0%}) · {tokens:,} tokens".replace("%", " %")
        return line if ms_per_token is None else f"{line} · {ms_per_token:.0f} ms/token"

    def token_texts(self) -> list[str]:
        """The text of each token; "" where a character goes on in the next one."""
        decode, texts, before, start = self.lm.tokenizer.decode, [], 0, 0
        for stop in range(1, len(self.ids) + 1):
            text = decode(self.ids[before:stop])[len(decode(self.ids[before:start])) :]
            if text.endswith("\ufffd") and stop < len(self.ids) and stop - start < 4:  # no character is longer
                texts.append("")
            else:
                texts.append(text)
                before, start = start, stop
        return texts


def check_room(tokens: int, max_new_tokens: int, max_positions: int) -> None:
    """
    Raises:
        SmartKVError: more tokens than the model has positions.
    """
    if tokens + max_new_tokens > max_positions:
        raise SmartKVError(
            f"{tokens:,} tokens of text and {max_new_tokens:,} new ones are more than the model's {max_positions:,} "
            "positions: shorten the text or lower max_new_tokens"
        )


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 / 10 else f"{count / 2**10:.1f} KiB"
