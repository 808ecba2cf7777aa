"""Check that a model's pre-RoPE keys are read at the right place."""

from typing import Any

import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.models.architecture import KEY_SITES
from smartkv.models.backbone import Backbone
from smartkv.models.observation import observe_attention


class _KeySiteObserver:
    """Keeps each layer's keys before and after the rotary embedding."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.rotated: list[Tensor] = []

    def on_keys(self, layer: int, keys: Tensor) -> None:
        self.keys.append(keys)

    def on_rotated_keys(self, layer: int, keys: Tensor) -> None:
        self.rotated.append(keys)

    def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None:
        pass


@torch.inference_mode()
def check_key_site(backbone: Backbone, tokens: int = 16) -> dict[str, Any]:
    """Check on a loaded model that the tensor read as the pre-RoPE key is that key.

    In every layer its shape must be `[kv_heads, tokens, head_dim]`, and the model's own rotary embedding must turn it
    into the key that attention uses.

    Args:
        backbone: The model to check.
        tokens: Length of the sequence that is run.

    Returns:
        `module` (the submodule's name), `rotary`, `shape`, and `difference_after_rotation`: the largest difference,
        relative to the layer's largest key element.

    Raises:
        SmartKVError: Shape or values do not fit.
    """
    model, arch = backbone.model, backbone.architecture
    base: Any = model.base_model
    site, observer = KEY_SITES[arch.model_type], _KeySiteObserver()
    ids = (torch.arange(tokens, device=model.device) % model.config.vocab_size)[None]
    with observe_attention(model, observer):
        base(input_ids=ids, use_cache=False)
    expected = (arch.kv_heads, tokens, arch.head_dim)
    worst = 0.0
    for layer, (key, used) in enumerate(zip(observer.keys, observer.rotated, strict=True)):
        if tuple(key.shape) != expected:
            raise SmartKVError(f"layer {layer}: the key has shape {list(key.shape)}, expected {list(expected)}")
        if site.rotary:
            cos, sin = base.rotary_emb(key, torch.arange(tokens, device=key.device)[None])
            first, second = key.chunk(2, dim=-1)
            key = key * cos + torch.cat([-second, first], dim=-1) * sin
        worst = max(worst, float((key - used).abs().max() / used.abs().max()))
    if len(observer.keys) != arch.layers or worst > 0.02:  # bfloat16 rounds by up to 0.4 %
        raise SmartKVError(f"{site.module} of '{backbone.name}' is not the pre-RoPE key: it is off by {worst:.3g}")
    return {"module": site.module, "rotary": site.rotary, "shape": list(expected), "difference_after_rotation": worst}
