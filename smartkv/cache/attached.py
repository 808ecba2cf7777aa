"""AttachedCache: the base of caches that compute the attention of their model themselves."""

import weakref
from abc import ABC, abstractmethod
from copy import deepcopy
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from smartkv.cache.model_patch import EvictionStep, is_evicting, patch_model
from smartkv.errors import SmartKVError
from smartkv.models.architecture import Architecture
from smartkv.models.wrappers import language_model


class AttachedCache(Cache, ABC):
    """A cache whose model attends through it, for as long as the cache lives or until `detach`.

    Args:
        model: a causal LM of a supported family.
        layers: the cache's layers, one per layer of the model.
        chunk: number of prompt tokens that go through the model together.

    Raises:
        SmartKVError: a chunk that is no number of tokens, or a family that is not supported.
    """

    def __init__(self, model: PreTrainedModel, layers: list[Any], chunk: int) -> None:
        if type(chunk) is not int or chunk < 1:
            raise SmartKVError(f"chunk must be a number of tokens, at least 1, got {chunk!r}")
        super().__init__(layers=layers)
        self.model = language_model(model)  # inside a wrapper, whose forward and generate call it
        self.architecture, self.chunk = Architecture.of(self.model.config), chunk
        self.attach()

    # -- attach and detach --------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Patch the model, so that it takes this cache. The constructor does it."""
        self._undo = patch_model(self.model, AttachedCache)
        self._finalizer = weakref.finalize(self, self._undo)
        self.attached = True

    def detach(self) -> None:
        """Restore the model, unless other caches are attached to it. Stored keys stay. A second call does nothing."""
        self.attached = False
        self._finalizer()

    def __enter__(self) -> Self:
        if not self.attached:
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
        own = ("attached", "_undo", "_finalizer")
        twin = object.__new__(type(self))
        twin.__dict__ = {name: deepcopy(value, memo) for name, value in self.__dict__.items() if name not in own}
        twin.attached = False
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
        if decoder is not self.model.base_model:
            raise self._other_model()
        if any(self.get_seq_length(layer) != self.get_seq_length() for layer in range(len(self.layers))):
            raise SmartKVError("a forward pass was interrupted, only some layers hold its tokens: call cache.reset()")
        self.check_length(self.get_seq_length() + tokens)

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
            self.check_call(self.model.base_model, 0)
            raise self._other_model()
        return key_states, value_states

    def _other_model(self) -> SmartKVError:
        return SmartKVError(
            "the cache was made for another model than the one it was given to: "
            f"make a cache for this model, {type(self).__name__}(model, …)"
        )
