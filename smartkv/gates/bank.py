"""The gates of a model: one small MLP per KV head, stored as grouped weights.

A gate is `Linear(head_dim → hidden) → ReLU → Linear(hidden → outputs)`. It reads a key before the rotary embedding.
All gates of a bank run in two batched matrix products.
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
from smartkv.gates.pretrained import CARD, CONFIG, WEIGHTS, check_details, find_file
from smartkv.io.atomic import write_atomically
from smartkv.io.checks import check_type, check_whole, read_dataclass
from smartkv.models.architecture import Fingerprint, check_model
from smartkv.models.layer_ranges import format_layers
from smartkv.models.wrappers import key_devices

log = logging.getLogger(__name__)

FORMAT_VERSION = 1


class GateBank(nn.Module, ModelHubMixin):
    """Gates for the KV heads of some or all layers of one model.

    Args:
        fingerprint: Architecture of the model that the gates belong to.
        layers: Indices of the layers that have gates, ascending. None means all layers.
        hidden: Width of the hidden layer.
        outputs: Number of predictions per key: 1 for log4 lifespan, one per age for gates that judge by age.
        details: Metadata stored in `config.json` beside the shape: target, threshold, training data, metrics, policy.

    Raises:
        SmartKVError: The layers are not ascending layers of the model, or the ages do not match `outputs`.

    Attributes:
        weight1: `[gates, head_dim, hidden]`. Gates are ordered by layer, then by head, in all four tensors.
        bias1: `[gates, 1, hidden]`.
        weight2: `[gates, hidden, outputs]`.
        bias2: `[gates, 1, outputs]`.
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
                f"gates for layers {self.layers}: expected ascending, distinct layers from 0-{fingerprint.layers - 1}"
            )
        self.hidden, self.outputs = hidden, outputs
        self.details = details or {}
        if self.ages and len(self.ages) != outputs:
            raise SmartKVError(
                f"gates for the ages {list(self.ages)} need one output per age ({len(self.ages)}), got {outputs}"
            )
        gates = len(self.layers) * fingerprint.kv_heads

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:  # the initialization of nn.Linear
            return nn.Parameter((2 * torch.rand(*shape) - 1) / math.sqrt(fan_in))

        self.weight1 = uniform(gates, fingerprint.head_dim, hidden, fan_in=fingerprint.head_dim)
        self.bias1 = uniform(gates, 1, hidden, fan_in=fingerprint.head_dim)
        self.weight2 = uniform(gates, hidden, outputs, fan_in=hidden)
        self.bias2 = uniform(gates, 1, outputs, fan_in=hidden)

    def __len__(self) -> int:
        return self.weight1.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.weight1.device

    @property
    def ages(self) -> tuple[int, ...]:
        """The ages, in tokens and ascending, at which the gates judge a key; one output each.

        Empty for gates that judge a key once.
        """
        return tuple(self.details.get("ages", ()))

    @property
    def heads(self) -> list[tuple[int, int]]:
        """The (layer, head) pair of each gate, in the order of the weights."""
        return [(layer, head) for layer in self.layers for head in range(self.fingerprint.kv_heads)]

    def check(self, model: PreTrainedModel) -> None:
        """Check that the gates fit `model` and are on its device, or on one of the devices of its layers.

        Raises:
            SmartKVError: The architecture or the device differs. The message names both.
        """
        Fingerprint.of(model).check(self.fingerprint, "the gates")
        devices = list(dict.fromkeys(map(str, key_devices(model))))
        if str(self.device) not in devices:
            raise SmartKVError(
                f"the gates are on {self.device}, the model is on {' and '.join(devices)}: "
                f"call gates.to('{devices[0]}')"
            )

    def forward(self, keys: Tensor) -> Tensor:
        """Predict all gates at once.

        Args:
            keys: `[gates, rows, head_dim]`, before the rotary embedding, in the dtype of the weights.

        Returns:
            Predictions `[gates, rows, outputs]`.
        """
        return torch.baddbmm(self.bias2, torch.baddbmm(self.bias1, keys, self.weight1).relu_(), self.weight2)

    def predict(self, layer: int, keys: Tensor) -> Tensor:
        """Predict with the gates of one layer, on the device of its keys.

        The layers of a model may lie on several devices, the weights of a bank lie on one. Those of the layer are
        copied where the devices differ: some hundred kilobytes.

        Args:
            layer: Index of the layer in the model.
            keys: `[batch, kv_heads, tokens, head_dim]`, before the rotary embedding, any float dtype.

        Returns:
            float32 `[batch, kv_heads, tokens, outputs]`, on the device of the keys.

        Raises:
            SmartKVError: The layer has no gates.
        """
        if layer not in self.layers:
            raise SmartKVError(f"layer {layer} has no gates: they were trained for layers {format_layers(self.layers)}")
        first_gate = self.layers.index(layer) * self.fingerprint.kv_heads
        gates = slice(first_gate, first_gate + self.fingerprint.kv_heads)
        parameters = (self.weight1, self.bias1, self.weight2, self.bias2)
        weight1, bias1, weight2, bias2 = (parameter[gates].to(keys.device) for parameter in parameters)
        return ((keys.to(weight1.dtype) @ weight1 + bias1).relu() @ weight2 + bias2).float()

    def score(self, layer: int, keys: Tensor) -> Tensor:
        """Score keys for a policy, which compares the score with its price; a larger score keeps a key longer.

        Args:
            layer: Index of the layer in the model.
            keys: `[batch, kv_heads, tokens, head_dim]`, before the rotary embedding, any float dtype.

        Returns:
            float32 `[batch, kv_heads, tokens]`; `[batch, kv_heads, tokens, ages]` for gates that judge by age.

        Raises:
            SmartKVError: The layer has no gates.
        """
        return self.read(self.predict(layer, keys))

    def read(self, prediction: Tensor) -> Tensor:
        """Convert outputs to scores with the objective that the gates were trained on.

        Scores of gates that judge by age never rise with age, because an evicted key cannot come back.

        Args:
            prediction: `[…, outputs]`.

        Returns:
            `[…]`; `[…, ages]` for gates that judge by age.
        """
        if self.ages:
            return prediction.cummin(dim=-1).values
        objective = objective_of_target(self.details.get("target", ""), self.details.get("objective", {}))
        return prediction[..., 0] if objective is None else objective.score(prediction)

    def single_score(self, score: Tensor) -> Tensor:
        """Reduce scores to one per key.

        For gates that judge by age this is the score at the last age, which decides whether a key stays for good.

        Args:
            score: What `score` or `read` returned.

        Returns:
            `[…]`. Scores of gates that judge a key once are returned unchanged.
        """
        return score[..., -1] if self.ages else score

    @torch.no_grad()
    def folded(self, mean: Tensor, std: Tensor) -> "GateBank":
        """Fold the standardisation of keys into the first linear layer.

        Args:
            mean: `[gates, head_dim]`, mean of each gate's training keys.
            std: `[gates, head_dim]`, their standard deviation.

        Returns:
            A new bank that reads raw keys and answers `gate((key − mean) / std)`.
        """
        # A deep copy, because a new bank would draw random weights and change what the training draws next.
        bank = copy.deepcopy(self)
        weight = self.weight1.double() / std.double()[:, :, None]
        bank.weight1.copy_(weight)
        bank.bias1.copy_(self.bias1.double() - mean.double()[:, None, :] @ weight)
        return bank

    @torch.no_grad()
    def unfolded(self, mean: Tensor, std: Tensor) -> "GateBank":
        """Return the bank of which this one is `folded(mean, std)`: it reads standardised keys; arguments as there."""
        bank = copy.deepcopy(self)
        weight = self.weight1.double()
        bank.weight1.copy_(weight * std.double()[:, :, None])
        bank.bias1.copy_(self.bias1.double() + mean.double()[:, None, :] @ weight)
        return bank

    # -- files ----------------------------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        dtype = torch.float16 if self.weight1.dtype == torch.float16 else torch.float32
        state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
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
        write_atomically(save_directory / CARD, self.card().encode())

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder_or_id: str | Path, model: PreTrainedModel | None = None, revision: str | None = None
    ) -> "GateBank":
        """Load gates from a folder, from the gates shipped with SmartKV, or from the hub.

        Only safetensors and JSON are read. The gates compute in float32, also if the file holds float16.

        Args:
            folder_or_id: A folder written by `save_pretrained`, a name from `smartkv.pretrained_gates()`, or a hub id.
            model: The model to use the gates with, loaded. Its architecture is checked; None checks nothing.
            revision: Revision of the hub repository.

        Raises:
            SmartKVError: An argument of a wrong type; the gates are missing, damaged, or for another architecture (the
                message names both).
        """
        if model is not None:
            check_model(model)
        config_path = find_file(folder_or_id, CONFIG, revision)
        weights_path = find_file(folder_or_id, WEIGHTS, revision)
        try:
            config = json.loads(config_path.read_text())
            if config["format_version"] != FORMAT_VERSION:
                raise SmartKVError(
                    f"{config_path} has format version {config['format_version']}, this SmartKV reads {FORMAT_VERSION}"
                )
            fingerprint = read_dataclass(Fingerprint, config["fingerprint"], least=1)
            hidden, outputs = (check_whole(name, config[name], 1) for name in ("hidden", "outputs"))
            details = check_details(config["details"])
            with torch.device("meta"):  # sizes claimed by a damaged config allocate nothing
                bank = cls(fingerprint, check_type("layers", config["layers"], list), hidden, outputs, details)
            objective_of_target(details.get("target", ""), details.get("objective", {}))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise SmartKVError(f"{config_path} does not describe gates ({type(error).__name__}: {error})") from error
        if model is not None:
            here = Fingerprint.of(model)
            here.check(fingerprint, f"the gates in {folder_or_id}")
            if not here.weight_hash:
                log.warning("the gates in %s: the model's weights cannot be read and compared", folder_or_id)
            elif here.weight_hash != fingerprint.weight_hash:
                log.warning("the gates in %s were trained on other weights of the same architecture", folder_or_id)
        try:
            data = weights_path.read_bytes()
            weights = {name: tensor.float() for name, tensor in load(data).items()}
            bank.load_state_dict(weights, assign=True)
        except (SafetensorError, RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SmartKVError(f"{weights_path} does not hold the gates its config.json describes: {reason}") from error
        # Early configs have no digest.
        if config.get("weights_sha256") not in (None, hashlib.sha256(data).hexdigest()):
            raise SmartKVError(
                f"{weights_path} was not written together with its config.json, or is damaged: export the gates again"
            )
        return bank.eval()

    def export_heads(self, out: Path) -> None:
        """Write one file per head, `l{layer}_h{head}.safetensors`.

        The tensors are named like those of a module whose `net` is `nn.Sequential(Linear, ReLU, Linear)`:
        `net.0.weight` `[hidden, head_dim]`, `net.0.bias` `[hidden]`, `net.2.weight` `[outputs, hidden]` and
        `net.2.bias` `[outputs]`.

        Args:
            out: Folder to write to.
        """
        for gate, (layer, head) in enumerate(self.heads):
            tensors = {
                "net.0.weight": self.weight1[gate].T,
                "net.0.bias": self.bias1[gate, 0],
                "net.2.weight": self.weight2[gate].T,
                "net.2.bias": self.bias2[gate, 0],
            }
            data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
            write_atomically(out / f"l{layer}_h{head}.safetensors", data)

    def card(self, name: str | None = None) -> str:
        """Write the model card.

        Args:
            name: What the card's code loads the gates from: a folder or a hub id. None means the name in `details`.
        """
        details = self.details if name is None else self.details | {"name": name}
        return model_card(len(self), self.fingerprint.describe(), format_layers(self.layers), details)


def head_name(layer: int, head: int) -> str:
    """Return the name of a head in logs, such as `L07H1`."""
    return f"L{layer:02d}H{head}"
