"""A conversation that one cache reads turn by turn, and a cache that records its decisions."""

from dataclasses import asdict, dataclass
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
from smartkv.policies.floating_price import FloatingPrice, Prices
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.planned_budget import Budget

QUERIES_AT_ONCE = 128  # queries for which the deaths under a cap are computed together
ANSWER = "\ue000"  # placeholder of an answer in a rendered template; no template writes this character


class RecordingCache(LifespanCache):
    """LifespanCache of one row that records each key's prediction and expiry, layer by layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of `LifespanCache`; nothing is recorded yet."""
        super().__init__(*args, **kwargs)
        self.recorded: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in self.rules]
        self.worth: list[list[Tensor]] = [[] for _ in self.rules]  # float16 `[kv_heads, tokens, ages]` under a budget

    @torch.no_grad()
    def expiry(self, layer: int, keys: Tensor, position: Tensor, sliding_window: int | None) -> Tensor:
        """Return the cache's expiries, and record them beside the gates' predictions.

        Predictions are recorded of every layer that has gates, also where the layer's rule does not use them.
        """
        expiry = super().expiry(layer, keys, position, sliding_window)
        prediction = self._scores_once(layer, keys)
        if prediction is None:
            prediction = torch.full(expiry.shape, torch.nan)
        elif self.gates is not None:
            prediction = self.gates.single_score(prediction)
        self.recorded[layer].append((position[0].cpu(), prediction[0].float().cpu(), expiry[0].cpu()))
        return expiry

    def _rank(self, layer: int, keys: Tensor, position: Tensor) -> Tensor:
        rank = super()._rank(layer, keys, position)
        if self.storage[layer].limit.floats:
            self.worth[layer].append(rank[0].cpu())
        return rank

    def decisions(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return what was decided about the keys of the first `tokens` positions.

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
            limit, decided = self.storage[layer].limit, expiries[layer, :, :read]
            if isinstance(limit.rule, Cap):  # the deaths under a cap follow from expiries and predictions
                decided.copy_(_capped(limit.rule, decided, predictions[layer, :, :read].nan_to_num(0)))
            elif isinstance(limit.rule, FloatingPrice) and limit.budget is not None:
                decided.copy_(_budgeted(limit.rule, decided, torch.cat(self.worth[layer], dim=1), limit.budget.cpu()))
        return predictions, expiries


def _capped(cap: Cap, expiry: Tensor, score: Tensor) -> Tensor:
    """Return expiries `[kv_heads, tokens]`, earlier where the cap evicts a key before its own expiry."""
    heads, tokens = expiry.shape
    position, ends = torch.arange(tokens).expand(heads, -1), expiry
    for start in range(0, tokens + 1, QUERIES_AT_ONCE):  # the next query, which is not read yet, included
        first, steps = torch.full((heads,), start), min(QUERIES_AT_ONCE, tokens + 1 - start)
        ends = torch.minimum(ends, cap.ends(position, expiry, score if cap.heads > 1 else None, first, steps))
    return ends


def _budgeted(price: FloatingPrice, expiry: Tensor, worth: Tensor, budget: Tensor) -> Tensor:
    """Return expiries `[kv_heads, tokens]`, earlier where the floating price lets a key go.

    Args:
        price: the rule of the layer.
        expiry: int64 `[kv_heads, tokens]`.
        worth: `[kv_heads, tokens, ages]`.
        budget: int64 `[1]`, keys of all heads.
    """
    heads, tokens = expiry.shape
    start, end = torch.tensor([0]), torch.tensor([tokens])
    position = torch.arange(tokens).expand(heads, -1)
    prices = Prices.of(1, expiry.device)
    return price.ends(position, expiry, worth, start, end, end, tokens + 1, budget, prices).ends


@dataclass(frozen=True)
class Turn:
    """One prompt and its answer.

    Attributes:
        prompt: the user's text.
        answer: the model's text.
        prompt_tokens: tokens that the prompt added.
        new_tokens: tokens that were generated.
        stopped: end, length or interrupted.
        ms_per_token: milliseconds a generated token after the first; None where there is no second one.
    """

    prompt: str
    answer: str
    prompt_tokens: int
    new_tokens: int
    stopped: str
    ms_per_token: float | None


def encode(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool, first: bool) -> list[int]:
    """Return the token ids that a turn adds.

    Args:
        tokenizer: the model's.
        text: the user's.
        chat: use the tokenizer's chat template, up to where the answer begins.
        first: the conversation starts here. Else the tokens begin with the end of the answer before.

    Raises:
        SmartKVError: the tokenizer has no chat template, or its template refuses the conversation.
    """
    if not chat:
        return tokenizer(text)["input_ids"]
    if tokenizer.chat_template is None:
        raise SmartKVError("this model's tokenizer has no chat template: leave out --chat to complete a text")
    messages = [{"role": "user", "content": text}]
    if not first:
        messages = [{"role": "user", "content": "…"}, {"role": "assistant", "content": ANSWER}, *messages]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except jinja2.TemplateError as error:
        raise SmartKVError(f"the tokenizer's chat template refuses this conversation: {error}") from error
    return tokenizer(rendered if first else rendered.partition(ANSWER)[2], add_special_tokens=False)["input_ids"]


class Conversation:
    """A text and the one cache that reads it. Each turn feeds only its new tokens.

    Args:
        lm: the model.
        gates: its gates; None for a policy without gated layers.
        policy: a solved policy, with no open window or price; under a budget its price is open.
        chat: turns use the tokenizer's chat template.
        budget: what the cache may hold; None: the policy decides.

    Raises:
        SmartKVError: model, gates, policy and budget do not fit together.
    """

    def __init__(
        self,
        lm: Backbone,
        gates: GateBank | None,
        policy: HybridPolicy,
        chat: bool = False,
        budget: Budget | None = None,
    ) -> None:
        """Start with an empty cache."""
        self.lm, self.chat = lm, chat
        self.cache = RecordingCache(lm.model, gates, policy, **(asdict(budget) if budget else {}))
        self.ids: list[int] = []
        self.generated: list[bool] = []
        self.turns: list[Turn] = []

    def encode(self, prompt: str, max_new_tokens: int) -> list[int]:
        """Return the token ids that `prompt` adds.

        Raises:
            SmartKVError: text and `max_new_tokens` together exceed the model's positions.
        """
        new = encode(self.lm.tokenizer, prompt, self.chat, first=not self.turns)
        if self.ids and new and new[0] == self.ids[-1] and new[0] in self.lm.tokenizer.all_special_ids:
            new = new[1:]  # the answer was closed by the model itself
        check_room(len(self.ids) + len(new), max_new_tokens, self.lm.architecture.max_positions)
        return new

    @torch.no_grad()
    def say(self, prompt: str, generation: GenerationConfig | None) -> Turn:
        """Read `prompt` and write the answer to stdout; without `generation` the prompt is only read.

        Raises:
            SmartKVError: as `encode`.
        """
        most = 0 if generation is None else generation.max_new_tokens
        new = self.encode(prompt, most)
        self.ids += new
        self.generated += [False] * len(new)
        ids = torch.tensor([self.ids], device=self.lm.model.device)
        with Interruptible() as watch, Answer(self.lm.tokenizer, lambda: self.status(watch.ms_per_token)) as answer:
            if generation is not None:
                generated = self.lm.model.generate(  # type: ignore[operator]  # a method, to mypy a buffer
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=self.cache,
                    generation_config=generation,
                    streamer=answer,
                    stopping_criteria=[watch],
                )
                everything = generated[0].tolist()
            else:
                unread = ids[:, self.cache.get_seq_length() :]
                self.lm.model.base_model(input_ids=unread, past_key_values=self.cache)
                everything = self.ids
        self.cache.settle()  # judges the latest keys too
        new_ids = everything[len(self.ids) :]
        self.ids = everything
        self.generated += [True] * len(new_ids)
        text = str(self.lm.tokenizer.decode(new_ids, skip_special_tokens=True))
        stopped = "interrupted" if watch.interrupted else "length" if len(new_ids) == most else "end"
        self.turns.append(Turn(prompt, text, len(new), len(new_ids), stopped, watch.ms_per_token))
        return self.turns[-1]

    def status(self, ms_per_token: float | None) -> str:
        """Return a line that compares the cache's bytes with a full cache's.

        Slots come in pages. Those of a short text may weigh more than the keys that were evicted: the line then says
        so, and compares keys.
        """
        tokens = self.cache.get_seq_length()
        if not tokens:
            return f"reading {len(self.ids):,} tokens …"
        stored, full = self.cache.storage_bytes, full_cache_bytes(self.lm.model, tokens)
        if stored <= full:
            held = f"KV {_size(stored)} of {_size(full)} full ({stored / full:.0%})"
        else:
            keys = float(self.cache.live_keys.double().mean()) / tokens
            held = f"KV {_size(stored)} with spare slots, full {_size(full)}, {keys:.0%} of the keys"
        line = f"{held} · {tokens:,} tokens".replace("%", " %")
        report = self.cache.report()
        if report.budget is not None:
            line += f" · {report.held:,.0f} of {report.budget:,.0f} keys a head"
        return line if ms_per_token is None else f"{line} · {ms_per_token:.0f} ms/token"

    @property
    def budgets(self) -> list[float | None]:
        """Keys a KV head that each layer may hold; None: its policy alone decides."""
        return [layer.budget for layer in self.cache.report().layers]

    def token_texts(self) -> list[str]:
        """Return the text of each token; the empty string where a character continues in the next token."""
        texts: list[str] = []
        before = start = 0

        def decode(ids: list[int]) -> str:
            return str(self.lm.tokenizer.decode(ids))

        for stop in range(1, len(self.ids) + 1):
            text = decode(self.ids[before:stop])[len(decode(self.ids[before:start])) :]
            if text.endswith("\ufffd") and stop < len(self.ids) and stop - start < 4:  # no character has more tokens
                texts.append("")
            else:
                texts.append(text)
                before, start = start, stop
        return texts


def check_room(tokens: int, max_new_tokens: int, max_positions: int) -> None:
    """Check that a text and its answer fit into the model's positions.

    Raises:
        SmartKVError: they do not.
    """
    if tokens + max_new_tokens > max_positions:
        raise SmartKVError(
            f"{tokens:,} tokens of text and {max_new_tokens:,} new ones are more than the model's {max_positions:,} "
            "positions: shorten the text or lower max_new_tokens"
        )


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 / 10 else f"{count / 2**10:.1f} KiB"
