"""The tokens that a cache was fed: which were padding, and which ids they had.

A cache cannot go back. So a mask or a prompt that tells another past than the cache has seen is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smartkv.errors import SmartKVError

PADDING, UNKNOWN = -1, -2  # in place of a token's id


class SeenTokens:
    """The tokens that a cache was fed, in columns of its batch.

    Attributes:
        padded: whether any token was padding.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._parts: list[Tensor] = []
        self.padded = False

    @property
    def ids(self) -> Tensor:
        """Ids of the tokens, int32 `[batch, columns]`; `PADDING` for padding, `UNKNOWN` where embeddings were given."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts, dim=1)]
        return self._parts[0] if self._parts else torch.empty(0, 0, dtype=torch.int32)

    def restore(self, ids: Tensor) -> None:
        """Take over the tokens of another cache, int32 `[batch, columns]`."""
        self._parts, self.padded = [ids], bool((ids == PADDING).any())

    def real(self, columns: int) -> Tensor | None:
        """Return which of the first `columns` tokens are real, bool `[batch, columns]`; None: no token is padding."""
        return self.ids[:, :columns] != PADDING if self.padded else None

    def append(self, inputs: Tensor, real: Tensor | None) -> None:
        """Add the tokens of a call.

        Args:
            inputs: ids `[batch, tokens]`, or embeddings `[batch, tokens, hidden]`.
            real: bool `[batch, tokens]`, False for padding; None: no padding.
        """
        ids = inputs.to(torch.int32) if inputs.dim() == 2 else inputs.new_full(inputs.shape[:2], UNKNOWN).int()
        if real is not None:
            ids, self.padded = ids.masked_fill(~real, PADDING), True
        self._parts.append(ids)

    def positions(self, inputs: Tensor, real: Tensor | None) -> Tensor:
        """Return the position of each token of a call among the real tokens of its row, int64 `[batch, tokens]`.

        Args:
            inputs, real: as in `append`, which has not been called for them. Padding has the position before it, or −1.
        """
        counted = torch.ones(inputs.shape[:2], device=inputs.device) if real is None else real
        before = (self.ids != PADDING).sum(dim=1, keepdim=True).to(inputs.device) if len(self.ids) else 0
        return counted.long().cumsum(dim=1) - 1 + before

    def keep(self, columns: int) -> None:
        """Keep the first `columns` tokens: the others were cropped, or their pass was interrupted."""
        if sum(part.shape[1] for part in self._parts) > columns:
            self._parts = [self.ids[:, :columns]]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch: int64 `[rows]`, which may repeat, or a mask bool `[batch]`."""
        if self._parts:
            self._parts = [self.ids[rows.to(self.ids.device)]]

    # -- checks -------------------------------------------------------------------------------------------------------

    def check_mask(self, mask: Any, inputs: Tensor) -> Tensor | None:
        """Return which tokens of a call are real, bool `[batch, tokens]`; None: no padding.

        Args:
            mask: the call's attention mask, over the tokens in the cache and those of the call; None: no padding.
            inputs: ids `[batch, tokens]`, or embeddings `[batch, tokens, hidden]`.

        Raises:
            SmartKVError: another number of rows than in the cache; or a mask that does not mark padding, covers
                another number of tokens, or tells something else about the tokens in the cache than earlier calls did.
        """
        (rows, tokens), held = inputs.shape[:2], self.ids.shape[1]
        if held and self._rows != rows:
            raise SmartKVError(f"the cache holds {self._rows} rows, the model was given {rows} rows")
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != (rows, held + tokens):
            shape = f"{mask.dim()}-D {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            earlier = f" after the {held} in the cache" if held else ""
            raise SmartKVError(
                f"the cache takes an attention mask [batch, tokens] that marks padding, got {shape} "
                f"for {rows} × {tokens} tokens{earlier}: its length must be {held + tokens}"
            )
        real = mask[:, held:].bool()
        flags = [((mask == 0) | (mask == 1)).all(), real.all()]
        if held:
            flags.append((mask[:, :held].bool() == (self.ids != PADDING).to(mask.device)).all())
        only_zeros_and_ones, all_real, *agrees = torch.stack(flags).tolist()  # one wait for the device, not three
        if not only_zeros_and_ones:
            raise SmartKVError(
                "the cache takes an attention mask of ones, and zeros for padding, got other numbers: "
                "an additive mask cannot be given with a cache"
            )
        if not all(agrees):
            raise SmartKVError(
                f"the attention mask and the {held} tokens in the cache do not agree which of these are padding, and "
                "tokens in the cache cannot be hidden or shown later: give the mask from the first call on, "
                "or call cache.reset() and start anew"
            )
        return None if all_real else real

    def check_prompt(self, prompt: Tensor, embed: Callable[[Tensor], Tensor]) -> None:
        """Check the whole conversation that `generate` was given, before any token is computed.

        Args:
            prompt: ids `[batch, tokens]`, or embeddings `[batch, tokens, hidden]`.
            embed: the model's embedding of ids. Tokens that the cache was given as embeddings are not compared.

        Raises:
            SmartKVError: the prompt is no longer than what the cache holds, or has another beginning.
        """
        held, tokens = self.ids.shape[1], prompt.shape[1]
        if not held:
            return
        advice = (
            "give the whole conversation, which begins with the tokens in the cache, "
            "or call cache.reset() before another prompt"
        )
        if tokens <= held:
            raise SmartKVError(f"the cache holds {held} tokens already, and the prompt has {tokens}: {advice}")
        if self._rows % len(prompt):
            return
        mine, known = self.ids, self.ids >= 0
        begin = prompt[:, :held].to(mine.device).repeat_interleave(self._rows // len(prompt), dim=0)
        if begin.dim() == 2:
            differs = begin != mine
        else:
            with torch.no_grad():
                differs = (embed(mine.clamp(min=0)).to(begin.device) != begin).any(dim=-1)
        differs = (differs & known).any(dim=0)
        if bool(differs.any()):
            raise SmartKVError(
                f"the cache holds {held} tokens of another text: the prompt differs from token "
                f"{int(differs.int().argmax())} on: {advice}"
            )

    @property
    def _rows(self) -> int:
        return len(self.ids)
