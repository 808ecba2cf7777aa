"""Changes of what a cache holds: rows of the batch, the latest tokens, and pins."""

import functools
from abc import abstractmethod
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor

from smartkv.cache.attached import AttachedCache
from smartkv.cache.autocast import without_autocast
from smartkv.cache.cache_budget import CacheBudget
from smartkv.cache.layer import Judge
from smartkv.cache.linear_layers import linear_layers, select_states
from smartkv.cache.pins import Pins
from smartkv.cache.seen_tokens import PADDING
from smartkv.cache.usage import CacheUsage
from smartkv.errors import SmartKVError
from smartkv.models.wrappers import input_device
from smartkv.policies.figures import check_tokens
from smartkv.policies.hybrid import HybridPolicy
from smartkv.quantization.per_token import Bits

F = TypeVar("F", bound=Callable[..., Any])


def _outside_autograd(function: F) -> F:
    """Run a cache's method alone, without gradients, on tensors that may be changed later outside `inference_mode`."""

    @functools.wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.in_use(), torch.inference_mode(False), torch.no_grad(), without_autocast(input_device(self.model)):
            return function(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


class CacheEdits(CacheUsage, AttachedCache):
    """Mixin of a LifespanCache.

    Attributes:
        pins: the pinned positions of each row.
        asked_pins: those that were asked for before the first token.
        first_columns: tokens of the first call, padding included.
    """

    policy: HybridPolicy
    budget: CacheBudget | None
    bits: Bits | None
    rollback: int
    pin_first: int
    pins: Pins
    asked_pins: Pins
    first_columns: int = 0

    @abstractmethod
    def _judge_of(self, layer: int) -> Judge:
        """Return the function that decides about the layer's new keys."""

    @_outside_autograd
    def settle(self) -> None:
        """Free the dead keys of all layers now. While decoding this happens every few tokens by itself."""
        for layer, storage in enumerate(self.storage):
            storage.call_peak_bytes = 0
            storage.settle(self._judge_of(layer))
            if storage.call_peak_bytes:
                self.note_peak(storage)

    def reset(self) -> None:
        """Forget all keys, as if the cache were new."""
        super().reset()
        self.moving_peak_bytes = 0
        self.start_pins()

    # -- pins ---------------------------------------------------------------------------------------------------------

    def start_pins(self) -> None:
        """Pin what the constructor was asked to pin, and nothing else."""
        self.pins = Pins()
        if self.pin_first:
            self.pins.add(torch.tensor([0]), torch.tensor([self.pin_first]))
        self.asked_pins = self.pins

    def check_pins(self) -> None:
        """Check that the policy can keep pinned keys.

        Raises:
            SmartKVError: it has a cap.
        """
        if self.policy.max_tokens is not None:
            raise SmartKVError(
                f"policy '{self.policy.name}' has a cap, which pins sinks and windows alone: "
                "give LifespanCache(…, max_tokens=…) in place of the policy's max_tokens"
            )

    @_outside_autograd
    def pin(self, start: int, stop: int) -> None:
        """Let the keys of some tokens stay whatever the policy says, whether the tokens have come yet or not.

        Args:
            start: position of the first token, among the real tokens of each row.
            stop: position after the last one.

        Raises:
            SmartKVError: positions out of order, a policy with a cap, keys that are freed already, or more pinned keys
                than the budget has room for.
        """
        check_tokens("start", start, least=0)
        check_tokens("stop", stop, least=start + 1)
        self.check_pins()
        self.settle()
        self._check_stored(start, stop)
        pins = deepcopy(self.pins)
        pins.add(torch.tensor([start]), torch.tensor([stop]))
        self._check_room(pins)
        self.pins = pins
        if not self.get_seq_length():
            self.asked_pins = pins
        for storage in self.storage:
            storage.pin(start, stop)

    def _check_stored(self, start: int, stop: int) -> None:
        """Check that no layer has freed the keys of these tokens, unless the model's own window hides them."""
        for layer, storage in enumerate(self.storage):
            if storage.is_initialized and (gone := storage.missing(start, stop)):
                raise SmartKVError(
                    f"{gone} keys of the tokens {start} to {stop - 1} are freed already in layer {layer}, and cannot "
                    "come back: pin tokens before they are read, or soon after"
                )

    def _check_room(self, pins: Pins) -> None:
        """Check that the budget has room for pinned keys beside sinks and window."""
        pinned, heads = pins.most(self.policy.sinks), self.architecture.kv_heads
        for layer, storage in enumerate(self.storage):
            if storage.limit.budget is not None:
                room = int(storage.limit.budget.min()) // heads
                always = self.policy.sinks + pinned + storage.min_lifetime
                if always > room:
                    raise SmartKVError(
                        f"{pinned} pinned tokens outgrow the budget: layer {layer} may hold {room} keys a KV head, and "
                        f"{always} would always stay ({self.policy.sinks} sinks, a window of {storage.min_lifetime}): "
                        "pin fewer, pin before the first call, or give a larger budget"
                    )

    # -- rows of the batch --------------------------------------------------------------------------------------------

    @_outside_autograd
    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, int64 `[rows]`, which may repeat. A cache without tokens has no rows yet.

        Raises:
            SmartKVError: there is no such row. On a GPU nobody looks, because the GPU would have to be waited for.
        """
        if not self._rows:
            return
        if rows.device.type == "cpu" and not ((rows >= 0) & (rows < self._rows)).all():
            raise SmartKVError(f"rows must lie between 0 and {self._rows - 1}, got {rows.tolist()}")
        self.settle()
        self.seen_tokens.select(rows)
        for storage in self.storage:
            storage.select(rows.to(storage.seen.device))
            self.note_peak(storage)
        select_states(self.layers, rows)
        self.pins.select(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows that beam search goes on with, int64 `[rows]`."""
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch: indices int64 `[rows]`, or a mask bool `[batch]`.

        Raises:
            SmartKVError: there is no such row, or the mask is not of this batch.
        """
        if self._rows and indices.dtype == torch.bool:
            if indices.shape != (self._rows,):
                raise SmartKVError(f"a mask of rows must have shape [{self._rows}], got {list(indices.shape)}")
            indices = indices.nonzero()[:, 0]
        elif self._rows:
            indices = torch.where(indices < 0, indices + self._rows, indices)
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        self.select_rows(torch.arange(self._rows).repeat_interleave(repeats))

    @property
    def _rows(self) -> int:
        return len(self.storage[0].seen) if self.storage[0].is_initialized else 0

    # -- the latest tokens --------------------------------------------------------------------------------------------

    @_outside_autograd
    def crop(self, tokens: int) -> None:
        """Drop the latest tokens. The cache is then as if it had never seen them.

        Args:
            tokens: minus the number of tokens to drop, 0 for none. A positive number is the number of tokens to keep,
                as in transformers 5.2.

        Raises:
            SmartKVError: more than `rollback` tokens would have to be dropped, or the cache or its model cannot do so.
        """
        if type(tokens) is not int:
            raise SmartKVError(f"crop takes a number of tokens, minus how many to drop, got {tokens!r}")
        held = self.get_seq_length()
        keep = min(held, tokens) if tokens > 0 else max(0, held + tokens)
        self.check_can_go_back(held - keep)
        if keep == held:
            return
        ids = self.seen_tokens.ids[:, keep:held]
        for layer, storage in enumerate(self.storage):
            dropped = (ids != PADDING).sum(dim=1).to(storage.seen.device)
            storage.forget_latest(held - keep, dropped, self._judge_of(layer))
            self.note_peak(storage)
        self.seen_tokens.keep(keep)

    def check_can_go_back(self, tokens: int) -> None:
        """Check that the latest tokens can be dropped, as assisted generation and prompt lookup do.

        Args:
            tokens: how many.

        Raises:
            SmartKVError: they cannot.
        """
        if not tokens:
            return
        name = self.architecture.model_type
        if linear_layers(self.layers):
            raise SmartKVError(
                f"a {type(self).__name__} of a {name} cannot be cropped (assisted generation and prompt lookup ask for "
                "it): the states of its layers with linear attention cannot go back"
            )
        if tokens > self.rollback:
            raise SmartKVError(
                f"{tokens} latest tokens cannot be dropped (assisted generation and prompt lookup ask for it), because "
                f"keys of more than the last {self.rollback} tokens may be freed: make the cache with rollback={tokens}"
            )
        held = self.get_seq_length()
        if self.bits is not None and held and held - tokens < self.first_columns:
            raise SmartKVError(
                f"{tokens} latest tokens cannot be dropped: with bits, the {self.first_columns} tokens of the first "
                "call stay, because their mean key is subtracted before packing"
            )
