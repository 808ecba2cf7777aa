"""Hooks that read pre-RoPE keys: each layer's, once a forward pass, and only while they are there."""

import copy

import pytest
import torch
from torch import Tensor, nn

from smartkv.models.architecture import attention_modules
from smartkv.models.key_hooks import hook_keys, read_keys, register_key_hooks
from tests.models import FAMILIES, llama, token_ids

by_family = pytest.mark.parametrize("family", FAMILIES)


@by_family
def test_each_layer_s_keys_come_with_its_module_in_order(family: str) -> None:
    model, calls = FAMILIES[family](), list[tuple[nn.Module, tuple[int, ...]]]()
    with torch.no_grad(), hook_keys(model, lambda module, keys: calls.append((module, tuple(keys.shape)))):
        model(token_ids(9)[None].expand(3, -1), use_cache=False)
    shape = (3, 4 if family == "gpt2" else 2, 9, 12 if family == "qwen3" else 8)
    assert [module for module, _ in calls] == attention_modules(model)
    assert [shape_ for _, shape_ in calls] == [shape, shape]


@by_family
def test_keys_of_the_first_layer_are_those_of_its_weights(family: str) -> None:
    """By plain loops over heads; the keys of later layers are tested where attention is observed."""
    model, ids = FAMILIES[family](), token_ids(9)
    attention, config = attention_modules(model)[0], model.config
    with torch.no_grad():
        if family == "gpt2":
            hidden = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(9))
            width = config.hidden_size
            weight = attention.c_attn.weight[:, width : 2 * width].T
            bias = attention.c_attn.bias[width : 2 * width]
            normed = model.transformer.h[0].ln_1(hidden)
        else:
            normed = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
            weight, bias = attention.k_proj.weight, attention.k_proj.bias
        (keys,) = read_keys(model, ids)[0]
        for head, key in enumerate(keys):
            rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            for token in range(9):
                want = weight[rows] @ normed[token] + (0 if bias is None else bias[rows])
                if family == "qwen3":
                    want = attention.k_norm(want)
                torch.testing.assert_close(key[token], want, atol=1e-5, rtol=1e-4)


def test_keys_have_the_model_s_dtype_and_one_entry_a_layer() -> None:
    keys = read_keys(llama().bfloat16(), token_ids(5).int())
    assert [(layer.dtype, tuple(layer.shape)) for layer in keys] == [(torch.bfloat16, (1, 2, 5, 8))] * 2


def test_removed_handles_end_the_calls() -> None:
    model, calls = llama(), list[int]()
    handles = register_key_hooks(model, lambda module, _: calls.append(module.layer_idx))
    model(token_ids(3)[None])
    for handle in handles:
        handle.remove()
    model(token_ids(3)[None])
    assert calls == [0, 1]


def test_hooks_end_with_the_context_also_after_an_exception() -> None:
    def fail(module: nn.Module, keys: Tensor) -> None:
        raise KeyError("in the middle")

    model = llama()
    with pytest.raises(KeyError, match="in the middle"), hook_keys(model, fail):
        model(token_ids(3)[None])
    assert not any(module._forward_hooks for module in model.modules())


def test_the_hooks_of_a_copied_model_name_the_modules_of_the_copy() -> None:
    model, modules = llama(), list[nn.Module]()

    def remember(module: nn.Module, keys: Tensor) -> None:
        modules.append(module)

    register_key_hooks(model, remember)
    copied = copy.deepcopy(model)
    copied(token_ids(3)[None])
    assert [id(module) for module in modules] == [id(module) for module in attention_modules(copied)]
