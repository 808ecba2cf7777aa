"""GateBank: the gates of all KV heads, as grouped weights.

A gate is `Linear(head_dim → hidden) → ReLU → Linear(hidden → outputs)` and reads a key before the rotary embedding.
All gates run in two batched matrix products.
"""

import copy
import hashlib
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.gates.model_card import model_card
from smartkv.gates.objectives import objective_of_target
from smartkv.gates.pretrained import CARD, CONFIG, WEIGHTS, checked_details, find
from smartkv.io.atomic import write_atomically
from smartkv.io.checks import check_type, check_whole, read_dataclass
from smartkv.models.architecture import Fingerprint
from smartkv.models.layer_ranges import format_layers

log = logging.getLogger(__name__)

FORMAT_VERSION = 1


class GateBank(nn.Module, ModelHubMixin):
    """Gates for the KV heads of some layers of one model.

    Args:
        fingerprint: the model that the gates belong to.
        layers: the layers that have gates, ascending; None: all.
        hidden: width of the hidden layer.
        outputs: predictions a key; one for log4 lifespan.
        details: what the config remembers beside the shape: target, threshold, training data, metrics, policy.

    Raises:
        SmartKVError: layers that the model does not have.

    Attributes:
        weight1 `[gates, head_dim, hidden]`, bias1 `[gates, 1, hidden]`,
        weight2 `[gates, hidden, outputs]`, bias2 `[gates, 1, outputs]`: gates in the order (layer, head).
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        layers: Iterable[int] | None = None,
        hidden: int = 64,
        outputs: int = 1,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.fingerprint = fingerprint
        self.layers = list(range(fingerprint.layers) if layers is None else layers)
        known = all(isinstance(layer, int) and 0 <= layer < fingerprint.layers for layer in self.layers)
        if not self.layers or not known or self.layers != sorted(set(self.layers)):
            raise SmartKVError(
                f"gates for layers {self.layers}: expected some of 0-{fingerprint.layers - 1}, ascending, each once"
            )
        self.hidden, self.outputs = hidden, outputs
        self.details = details or {}
        if self.ages and len(self.ages) != outputs:
            raise SmartKVError(f"gates that judge for the ages {list(self.ages)} have an output each, not {outputs}")
        gates = len(self.layers) * fingerprint.kv_heads

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:  # as nn.Linear does
            return nn.Parameter((2 * torch.rand(*shape) - 1) / math.sqrt(fan_in))

        self.weight1 = uniform(gates, fingerprint.head_dim, hidden, fan_in=fingerprint.head_dim)
        self.bias1 = uniform(gates, 1, hidden, fan_in=fingerprint.head_dim)
        self.weight2 = uniform(gates, hidden, outputs, fan_in=hidden)
        self.bias2 = uniform(gates, 1, outputs, fan_in=hidden)

    def __len__(self) -> int:
        return self.weight1.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weight1.device

    @property
    def ages(self) -> tuple[int, ...]:
        """For which the gates judge a key, in tokens, ascending, an output each; none: once and for all."""
        return tuple(self.details.get("ages", ()))

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, head) of each gate."""
        return [(layer, head) for layer in self.layers for head in range(self.fingerprint.kv_heads)]

    def check(self, model: PreTrainedModel) -> None:
        """Refuse to serve a model of another architecture, or on another device.

        Raises:
            SmartKVError: naming both.
        """
        Fingerprint.of(model).check(self.fingerprint, "the gates")
        if self.device != model.device:
            raise SmartKVError(
                f"the gates are on {self.device}, the model is on {model.device}: call gates.to('{model.device}')"
            )

    def forward(self, keys: Tensor) -> Tensor:
        """`keys` `[gates, rows, head_dim]` -> predictions `[gates, rows, outputs]`."""
        return torch.baddbmm(self.bias2, torch.baddbmm(self.bias1, keys, self.weight1).relu_(), self.weight2)

    def predict(self, layer: int, keys: Tensor) -> Tensor:
        """One layer's predictions.

        Args:
            layer: its index in the model.
            keys: before the rotary embedding, `[batch, kv_heads, tokens, head_dim]`, any float dtype.

        Returns:
            float32 `[batch, kv_heads, tokens, outputs]`.

        Raises:
            SmartKVError: the layer has no gates.
        """
        if layer not in self.layers:
            raise SmartKVError(f"layer {layer} has no gates: they were trained for layers {format_layers(self.layers)}")
        place = self.layers.index(layer) * self.fingerprint.kv_heads
        here = slice(place, place + self.fingerprint.kv_heads)
        hidden = (keys.to(self.weight1.dtype) @ self.weight1[here] + self.bias1[here]).relu()
        return (hidden @ self.weight2[here] + self.bias2[here]).float()

    def score(self, layer: int, keys: Tensor) -> Tensor:
        """What a policy compares with its price: the larger, the longer a key stays.

        Args as `predict`; returns float32 `[batch, kv_heads, tokens]`, and `[…, ages]` from gates that judge for ages.
        """
        return self.read(self.predict(layer, keys))

    def read(self, prediction: Tensor) -> Tensor:
        """The score in what the gates put out, by the objective they were trained on: `[…, outputs]` -> `[…]`, or
        `[…, ages]`, falling with age: what is gone does not come back."""
        if self.ages:
            return prediction.cummin(dim=-1).values
        objective = objective_of_target(self.details.get("target", ""), self.details.get("objective", {}))
        return prediction[..., 0] if objective is None else objective.score(prediction)

    def single_score(self, score: Tensor) -> Tensor:
        """One score a key, `[…, ages]` -> `[…]`: of gates that judge for ages that of the last, to stay for good. The
        scores of other gates are returned as they are."""
        return score[..., -1] if self.ages else score

    @torch.no_grad()
    def folded(self, mean: Tensor, std: Tensor) -> "GateBank":
        """The same gates for raw keys: `gate((key − mean) / std)` with the standardisation in the first Linear.

        Args:
            mean, std: of each gate's training keys, `[gates, head_dim]`.
        """
        bank = copy.deepcopy(self)  # a new bank would draw random numbers, and change what the training draws next
        weight = self.weight1.double() / std.double()[:, :, None]
        bank.weight1.copy_(weight)
        bank.bias1.copy_(self.bias1.double() - mean.double()[:, None, :] @ weight)
        return bank

    # -- files ----------------------------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        wide = torch.float16 if self.weight1.dtype == torch.float16 else torch.float32
        state = {name: tensor.detach().to("cpu", wide).contiguous() for name, tensor in self.state_dict().items()}
        weights = save(state)
        config = {
            "format_version": FORMAT_VERSION,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "fingerprint": asdict(self.fingerprint),
            "layers": self.layers,
            "hidden": self.hidden,
            "outputs": self.outputs,
            "details": self.details,
        }
        write_atomically(save_directory / WEIGHTS, weights)
        write_atomically(save_directory / CONFIG, json.dumps(config, indent=1, sort_keys=True).encode())
        write_atomically(save_directory / CARD, self._card().encode())

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder_or_id: str | Path, model: PreTrainedModel | None = None, revision: str | None = None
    ) -> "GateBank":
        """Load gates from a folder, from those that come with SmartKV, or from the hub; safetensors and JSON only. They
        compute in float32, also where their file holds float16.

        Args:
            folder_or_id: a folder that `save_pretrained` wrote, a name of `smartkv.pretrained_gates()`, or a hub id.
            model: the model they shall serve; its architecture is checked.
            revision: of the hub repository.

        Raises:
            SmartKVError: not there, damaged, or for another architecture (both are named).
        """
        config_path = find(folder_or_id, CONFIG, revision)
        weights_path = find(folder_or_id, WEIGHTS, revision)
        try:
            config = json.loads(config_path.read_text())
            if config["format_version"] != FORMAT_VERSION:
                raise SmartKVError(
                    f"{config_path} has format version {config['format_version']}, this SmartKV reads {FORMAT_VERSION}"
                )
            fingerprint = read_dataclass(Fingerprint, config["fingerprint"], least=1)
            hidden, outputs = (check_whole(name, config[name], 1) for name in ("hidden", "outputs"))
            details = checked_details(config["details"])
            with torch.device("meta"):  # sizes that a damaged file claims cost nothing until the weights agree
                bank = cls(fingerprint, check_type("layers", config["layers"], list), hidden, outputs, details)
            objective_of_target(details.get("target", ""), details.get("objective", {}))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise SmartKVError(f"{config_path} does not describe gates ({type(error).__name__}: {error})") from error
        if model is not None:
            Fingerprint.of(model).check(fingerprint, f"the gates in {folder_or_id}")
            if Fingerprint.of(model).weight_hash != fingerprint.weight_hash:
                log.warning("the gates in %s were trained on other weights of the same architecture", folder_or_id)
        try:
            data = weights_path.read_bytes()
            weights = {name: tensor.float() for name, tensor in load(data).items()}
            bank.load_state_dict(weights, assign=True)
        except (SafetensorError, RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SmartKVError(f"{weights_path} does not hold the gates its config.json describes: {reason}") from error
        if config.get("weights_sha256") not in (None, hashlib.sha256(data).hexdigest()):  # None: there was none before
            raise SmartKVError(
                f"{weights_path} was not written together with its config.json, or is damaged: export the gates again"
            )
        return bank.eval()

    def export_heads(self, out: Path) -> None:
        """One file a head, `l{layer}_h{head}.safetensors`, named like `nn.Sequential(Linear, ReLU, Linear)`:
        `net.0.weight` `[hidden, head_dim]`, `net.0.bias`, `net.2.weight` `[outputs, hidden]`, `net.2.bias`."""
        for gate, (layer, head) in enumerate(self.heads):
            tensors = {
                "net.0.weight": self.weight1[gate].T,
                "net.0.bias": self.bias1[gate, 0],
                "net.2.weight": self.weight2[gate].T,
                "net.2.bias": self.bias2[gate, 0],
            }
            data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
            write_atomically(out / f"l{layer}_h{head}.safetensors", data)

    def _card(self) -> str:
        return model_card(len(self), self.fingerprint.describe(), format_layers(self.layers), self.details)


def head_name(layer: int, head: int) -> str:
    """The log name of a head: `L07H1`."""
    return f"L{layer:02d}H{head}"
