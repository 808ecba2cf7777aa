"""Models, an adaptive codec and a loop of calls for the tests of caches that quantise."""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from smartkv.quantization.codecs import Adaptive
from tests.models import FAMILIES

TOKENS = 40
MODELS = {name: make(**({"head_dim": 16} if name == "qwen3" else {})) for name, make in FAMILIES.items()}
ADAPTIVE = Adaptive(0.6, block=8)


@torch.inference_mode()
def fed(model: PreTrainedModel, ids: Tensor, cache: Cache, sizes: int = 1) -> Tensor:
    """Logits `[batch, tokens, vocabulary]`, so many tokens at a time."""
    parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)]
    return torch.cat(parts, dim=1)
