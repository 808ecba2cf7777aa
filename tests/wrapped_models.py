"""Tiny models in the forms in which people hold them: wrapped, with packed weights, offloaded."""

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel


class ValueHead(nn.Module):
    """Like trl's AutoModelForCausalLMWithValueHead: a module around the model, which answers with a tuple."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.pretrained_model, self.config = model, model.config
        self.v_head = nn.Linear(model.config.hidden_size, 1)

    def forward(self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Any = None) -> tuple[Any, ...]:
        given = {"past_key_values": past_key_values, "attention_mask": attention_mask, "output_hidden_states": True}
        output = self.pretrained_model(input_ids, **given)
        return output.logits, None, self.v_head(output.hidden_states[-1])[..., 0]

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.pretrained_model.generate(*args, **kwargs)


class QuantLinear(nn.Module):
    """Like the linear modules of GPTQ and AWQ: packed weights, and no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scales = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.qweight * self.scales, self.bias)


class Int8Tensor(Tensor):
    """Like the weights of torchao: a tensor made of others, which only a linear module can use."""

    @staticmethod
    def __new__(cls, content: Tensor, scales: Tensor) -> "Int8Tensor":
        return Tensor._make_wrapper_subclass(cls, content.shape, dtype=scales.dtype)

    def __init__(self, content: Tensor, scales: Tensor) -> None:
        self.content, self.scales = content, scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["content", "scales"], None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            inputs, weight, *bias = args
            return F.linear(inputs, weight.content * weight.scales, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].content, args[0].scales)
        raise NotImplementedError(f"Int8Tensor: {function}")


def lora(model: PreTrainedModel) -> nn.Module:
    targets = ["c_attn"] if model.config.model_type == "gpt2" else ["k_proj", "q_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return wrapped.eval()


def packed(model: PreTrainedModel) -> nn.Module:
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, QuantLinear(child))
    return model


def torchao(model: PreTrainedModel) -> nn.Module:
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            quantised = QuantLinear(module)
            module.weight = nn.Parameter(Int8Tensor(quantised.qweight, quantised.scales), requires_grad=False)
    return model


def dynamic_int8(model: PreTrainedModel) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # torch announces that torchao takes this over
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def offloaded_to_memory(model: PreTrainedModel) -> nn.Module:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def offloaded_to_disk(model: PreTrainedModel) -> nn.Module:
    return disk_offload(model, tempfile.mkdtemp(prefix="smartkv-offload-"), execution_device=torch.device("cpu"))


def device_map(model: PreTrainedModel) -> nn.Module:
    """The last layer's weights lie on the disk, the others in memory."""
    places = {name: "cpu" for name, module in model.named_children() if not hasattr(module, "layers")}
    places |= {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    last = len(model.model.layers) - 1
    places |= {f"model.layers.{layer}": "disk" if layer == last else "cpu" for layer in range(last + 1)}
    folder = tempfile.mkdtemp(prefix="smartkv-offload-")
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


WRAPPERS: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "value head": ValueHead,
    "LoRA": lora,
    "data parallel": nn.DataParallel,
    "in memory": offloaded_to_memory,
    "on the disk": offloaded_to_disk,
    "device map": device_map,
}
"""Forms in which the base model's weights are those of the model itself."""

PACKED: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "no weight": packed,
    "torchao": torchao,
    "dynamic int8": dynamic_int8,
}
"""Forms with other, packed weights."""
