"""AttachedCache: the base of caches that compute the attention of their model themselves."""

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from smartkv.cache.forward_pass import EvictionStep, current_pass
from smartkv.cache.linear_layers import forget_states, layers_of_model, linear_layers
from smartkv.cache.model_patch import is_evicting, patch_model
from smartkv.cache.seen_tokens import SeenTokens
from smartkv.errors import SmartKVError
from smartkv.models.architecture import Architecture
from smartkv.models.rotary import SwitchingRotary
from smartkv.models.wrappers import decoder_of, language_model


class AttachedCache(Cache, ABC):
    """A cache whose model attends through it, for as long as the cache lives or until `detach`.

    Threads may share a model. They may not share a cache: one conversation goes through it.

    Args:
        model: a causal LM of a supported family.
        layers: the cache's layers, one per layer of the model that has attention.
        chunk: number of prompt tokens that go through the model together.

    Attributes:
        seen_tokens: which tokens the cache has seen.
        interrupted: whether an exception left only some of a pass's tokens in it.
        planned_columns: tokens of prompt and answer, padding included, that `generate` was asked for; None: not in it.
        prompt_columns: tokens of the prompt that `generate` was given; None: not in it, or it does not know them.

    Raises:
        SmartKVError: a chunk that is no number of tokens, or a family that is not supported.
    """

    attached = False
    interrupted = False
    planned_columns: int | None = None
    prompt_columns: int | None = None

    def __init__(self, model: PreTrainedModel, layers: list[Any], chunk: int) -> None:
        if type(chunk) is not int or chunk < 1:
            raise SmartKVError(f"chunk must be a number of tokens, at least 1, got {chunk!r}")
        lm = language_model(model)  # inside a wrapper, whose forward and generate call it
        super().__init__(layers=layers_of_model(lm.config, layers))
        self.model = lm
        self.architecture, self.chunk = Architecture.of(self.model.config), chunk
        self.seen_tokens, self._rotary = SeenTokens(), SwitchingRotary.of(self.model.config)
        self._lock = threading.RLock()
        self.attach()

    # -- attach and detach --------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Patch the model, so that it takes this cache. The constructor does it. A second call does nothing."""
        if self.attached:
            return
        self._undo = patch_model(self.model, AttachedCache)
        self._finalizer = weakref.finalize(self, self._undo)
        self.attached = True

    def detach(self) -> None:
        """Restore the model, unless other caches are attached to it. Stored keys stay. A second call does nothing."""
        if self.attached:  # else there is nothing to undo, or this is a copy of a detached cache
            self.attached = False
            self._finalizer()

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the keys but neither model nor gates, to continue one prompt in several ways."""
        for shared in (self.model, getattr(self, "gates", None)):
            memo[id(shared)] = shared
        own = ("attached", "_undo", "_finalizer", "_lock")
        twin = object.__new__(type(self))
        with self.in_use():
            twin.__dict__ = {name: deepcopy(value, memo) for name, value in self.__dict__.items() if name not in own}
        twin.attached, twin._lock = False, threading.RLock()
        if self.attached:
            twin.attach()
        return twin

    # -- a forward pass -----------------------------------------------------------------------------------------------

    @abstractmethod
    def attend(self, layer: int, step: EvictionStep) -> Tensor:
        """Store the tokens of a forward pass in one layer, and compute their attention.

        Args:
            layer: index of the layer.
            step: the layer's inputs.

        Returns:
            `[batch, query_heads, tokens, head_dim]`.
        """

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep other threads from using the cache inside the context.

        Raises:
            SmartKVError: another thread uses it.
        """
        if not self._lock.acquire(blocking=False):
            raise SmartKVError(
                f"another thread uses this {type(self).__name__}: give each thread a cache of its own, "
                "a model may be shared"
            )
        try:
            yield
        finally:
            self._lock.release()

    def chunk_of_call(self, tokens: int) -> int:
        """Return how many of a call's `tokens` tokens go through the decoder together.

        Where the rotary embedding depends on the length of a call, they all do: else logits would depend on `chunk`.
        """
        switches = self._rotary is not None and self.get_seq_length() + tokens > self._rotary.length
        return max(1, tokens) if switches else self.chunk

    def check_call(self, decoder: nn.Module, tokens: int) -> None:
        """Check a forward pass before it begins.

        Args:
            decoder: the model's decoder, whose forward was called.
            tokens: number of tokens in the call.

        Raises:
            SmartKVError: the cache is detached or belongs to another model, the model has too few positions, or an
                earlier forward pass was interrupted.
        """
        if not self.attached:
            raise SmartKVError("the cache was detached from its model: call cache.attach(), or use it in `with cache:`")
        if decoder is not decoder_of(self.model):
            raise self._other_model()
        forward_pass = current_pass()
        if forward_pass is not None and forward_pass.cache is self:
            raise SmartKVError("the model was called with this cache inside a forward pass on it: use another cache")
        self.check_whole()
        self.seen_tokens.keep(self.get_seq_length())
        self.check_length(self.get_seq_length() + tokens)
        self._check_rotary(self.get_seq_length(), self.get_seq_length() + tokens)

    def begin_call(self, tokens: int, real: Tensor | None, rows: int) -> None:
        """Prepare for a call that has been checked.

        Args:
            tokens: in each row of the call, padding included.
            real: bool `[batch, tokens]`, False for padding; None: no padding.
            rows: of the batch.
        """

    def check_whole(self) -> None:
        """Check that no forward pass was interrupted.

        Raises:
            SmartKVError: one was.
        """
        if self.interrupted:
            raise SmartKVError(
                "a forward pass was interrupted, the cache may hold only some of its tokens: call cache.reset()"
            )

    @contextmanager
    def interruption_noted(self) -> Iterator[None]:
        """Note inside the context whether an exception leaves only some of a pass's tokens in the cache."""
        before = self.get_seq_length()
        try:
            yield
        except BaseException:
            lengths = [layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)]
            self.interrupted = any(length != before for length in lengths) or bool(linear_layers(self.layers))
            raise

    def check_answer(self, prompt: int | None, tokens: int) -> None:
        """Check an answer of `generate` before it begins.

        Args:
            prompt: number of tokens of the prompt; None: unknown.
            tokens: number of tokens of prompt and answer.

        Raises:
            SmartKVError: the model has too few positions, or another rotary embedding from a length on that lies in
                the answer.
        """
        self.check_length(tokens)
        self.planned_columns, self.prompt_columns = tokens, prompt
        if prompt is not None:
            self._check_rotary(prompt, tokens)

    def _check_rotary(self, before: int, after: int) -> None:
        """Refuse a switch of the rotary embedding that would leave the keys before it rotated the other way."""
        rotary = self._rotary
        if rotary is not None and not rotary.gradual and 0 < before <= rotary.length < after:
            raise SmartKVError(
                f"this model's {rotary.rope_type} rotates all keys in another way beyond {rotary.length} tokens, but "
                f"{before} are rotated already and {after} were asked for: give a longer prompt at once, "
                "or lower max_new_tokens"
            )

    def check_can_go_back(self, tokens: int) -> None:
        """Check that the latest tokens can be dropped, as assisted generation and prompt lookup do.

        Args:
            tokens: how many.

        Raises:
            SmartKVError: they cannot.
        """
        self.crop(0)

    def reset(self) -> None:
        """Forget all keys, as if the cache were new."""
        with self.in_use():
            forget_states(self.layers)
            super().reset()
            self.seen_tokens.reset()
            self.interrupted = False

    def check_length(self, tokens: int) -> None:
        """Check that the model has positions for `tokens` tokens, those in the cache included.

        Raises:
            SmartKVError: it has fewer.
        """
        if tokens > self.architecture.max_positions:
            raise SmartKVError(
                f"prompt and answer come to {tokens} tokens, the model has {self.architecture.max_positions} positions "
                f"({self.get_seq_length()} are in the cache): shorten the prompt, or lower max_new_tokens"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the tensors as they are. The model calls this just before its attention function calls `attend`.

        Raises:
            SmartKVError: the cache is not attached to this model, whose attention would ignore it.
        """
        if not is_evicting(self.model, self):
            self.check_call(decoder_of(self.model), 0)
            raise self._other_model()
        return key_states, value_states

    def __reduce__(self) -> Any:
        raise SmartKVError(f"a {type(self).__name__} cannot be pickled: write a LifespanCache with save_cache")

    def _other_model(self) -> SmartKVError:
        return SmartKVError(
            "the cache was made for another model than the one it was given to: "
            f"make a cache for this model, {type(self).__name__}(model, …). If it is the same model, a layer was "
            "called by itself, or the decoder was compiled or lost a hook while caches lived: detach them all"
        )
