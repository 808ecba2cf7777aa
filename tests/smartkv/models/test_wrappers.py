"""The model inside a wrapper, and the devices of its layers."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from smartkv.errors import SmartKVError
from smartkv.models.wrappers import input_device, key_devices, language_model
from tests.models import FAMILIES, gpt2, llama
from tests.wrapped_models import PACKED, WRAPPERS, ValueHead, offloaded_to_memory


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_model_inside_a_wrapper_is_found(wrapper: str) -> None:
    model = llama()
    assert language_model(WRAPPERS[wrapper](model)) is model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_and_its_decoder_are_their_own(family: str) -> None:
    model = FAMILIES[family]()
    assert language_model(model) is model
    assert language_model(model.base_model) is model.base_model
    assert language_model(torch.compile(ValueHead(model))) is model


def test_a_model_that_is_held_twice_is_found_once() -> None:
    model = llama()
    assert language_model(nn.ModuleList([model, ValueHead(model)])) is model


def test_several_models_or_none_are_refused() -> None:
    with pytest.raises(SmartKVError, match=r"holds 2 of them \(LlamaForCausalLM, GPT2LMHeadModel\): give one"):
        language_model(nn.ModuleList([llama(), gpt2()]))
    with pytest.raises(SmartKVError, match="got a Linear that holds none"):
        language_model(nn.Linear(2, 2))


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_an_adapter_that_puts_tokens_into_the_cache_is_refused(config: type) -> None:
    model = get_peft_model(llama(), config(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(SmartKVError, match=r"adapters of type P\w+_TUNING are not supported.* such as LoRA"):
        language_model(model)


@pytest.mark.parametrize("wrapper", [*WRAPPERS, *PACKED])
def test_keys_are_computed_where_the_weights_are_used_and_not_where_they_lie(wrapper: str) -> None:
    model = (WRAPPERS | PACKED)[wrapper](llama())
    assert key_devices(model) == [torch.device("cpu")] * 2
    assert input_device(model) == torch.device("cpu")


def test_each_layer_has_a_device_of_its_own() -> None:
    model = offloaded_to_memory(llama())
    for module in model.model.layers[1].modules():
        if hasattr(module, "_hf_hook"):
            module._hf_hook.execution_device = "meta"
    assert key_devices(model) == [torch.device("cpu"), torch.device("meta")]
    assert key_devices(llama().to("meta")) == [torch.device("meta")] * 2
