"""Quantised caches as contenders: every key is kept, in few bits."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.contenders.base import Reading, stored_share
from smartkv.cache.attached import AttachedCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.metrics.perplexity import losses_after, query_before
from smartkv.models.backbone import Backbone


@dataclass
class QuantisedContender:
    """A cache that keeps every key in few bits.

    The text is read in pieces, so that queries see quantised keys, as they do while decoding.

    Attributes:
        lm: the model.
        name: its name in results.
        make: makes an empty cache.
        needs: see `Contender`.
        kind: see `Contender`.
        at_once: tokens of a piece. They are no more than a group of the codec, so that the same keys are exact as in
            decoding.
    """

    lm: Backbone
    name: str
    make: Callable[[], QuantizedCache]
    needs: str = "nothing"
    kind: str = "quantised"
    at_once: int | None = 32

    def solved(self, footprint: float) -> Any:
        """Return the share of the keys that it keeps: all of them."""
        return 1.0

    @torch.inference_mode()
    def read(self, setting: Any, tokens: Tensor, first_token: int, first_query: int, prefill: int | None) -> Reading:
        """Read a text piece by piece; see `Contender.read`."""
        ids, peak, hidden = tokens.long().to(self.lm.model.device), 0, []
        with self.open(setting, first_query) as cache:
            for part in ids[None, :-1].split(self.at_once or len(ids), dim=1):
                hidden.append(self.lm.model.base_model(input_ids=part, past_key_values=cache).last_hidden_state[0])
                peak = max(peak, cache.storage_bytes + cache.read_bytes)
            losses = losses_after(self.lm.model, torch.cat(hidden)[query_before(first_token) :], ids[first_token:])
            return Reading(*losses, 1.0, peak, stored_share(self.lm, cache, len(tokens) - 1))

    def open(self, setting: Any, first_query: int) -> AbstractContextManager[QuantizedCache]:
        """Open an empty quantised cache; see `Decoding.open`."""
        cache = self.make()
        return cache if isinstance(cache, AttachedCache) else nullcontext(cache)
