"""Check that a model's pre-RoPE keys are read at the right place."""

from typing import Any

import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.models.architecture import attention_modules
from smartkv.models.backbone import Backbone
from smartkv.models.key_sites import KEY_SITES
from smartkv.models.observation import observe_attention
from smartkv.models.rotary import Rotation


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

    In every layer its shape must be `[kv_heads, tokens, head_dim]`, and the model's own rotary embedding, with a norm
    after it if the family has one, must turn it into the key that attention uses.

    Args:
        backbone: The model to check.
        tokens: Length of the sequence that is run.

    Returns:
        `module` (the submodule's name), `rotary` (whether any layer has such an embedding), `shape`, and
        `difference_after_rotation`: the largest difference, relative to the layer's largest key element.

    Raises:
        SmartKVError: Shape or values do not fit.
    """
    model, arch = backbone.model, backbone.architecture
    base: Any = model.base_model
    attention, observer = attention_modules(model), _KeySiteObserver()
    site, position = KEY_SITES[arch.model_type].of(attention[0]), torch.arange(tokens, device=model.device)
    ids = (position % model.config.vocab_size)[None]
    with observe_attention(model, observer):
        base(input_ids=ids, use_cache=False)
    expected = (arch.kv_heads, tokens, arch.head_dim)
    worst = 0.0
    for layer, (key, used) in enumerate(zip(observer.keys, observer.rotated, strict=True)):
        if tuple(key.shape) != expected:
            raise SmartKVError(f"layer {layer}: the key has shape {list(key.shape)}, expected {list(expected)}")
        key = Rotation(model, layer).rotate(key, position)
        if site.norm_after is not None:
            key = attention[layer].get_submodule(site.norm_after)(key.to(used.dtype))
        worst = max(worst, float((key - used).abs().max() / used.abs().max()))
    if len(observer.keys) != arch.layers or worst > 0.02:  # bfloat16 rounds by up to 0.4 %
        raise SmartKVError(f"{site.module} of '{backbone.name}' is not the pre-RoPE key: it is off by {worst:.3g}")
    rotary = any(map(site.rotary, attention))
    return {"module": site.module, "rotary": rotary, "shape": list(expected), "difference_after_rotation": worst}
