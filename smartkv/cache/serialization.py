"""A LifespanCache in a file, to continue a long prompt another time.

The file is one safetensors file. For each layer `L` it holds

* `L.key` and `L.value` `[keys, head_dim]`, or uint8 `[keys, row bytes]` where keys are packed in few bits;
* `L.position` and `L.expiry` int32 `[keys]`;
* `L.score` float32 `[keys]`, if the layer's heads share a cap; or float16 `[keys, ages]`, their worth under a budget;
* `L.counts` int64 `[pairs]`, keys of each pair (see `smartkv.cache.ragged`);
* `L.seen` int64 `[batch]`, real tokens of each row;
* `L.final` int64 `[batch]`, the position before which deaths are final;
* `L.prices` float32 `[2, batch]`, the floating prices at that position (see `Prices`), and `L.budget` int64 `[batch]`,
  under a budget;
* `L.deaths` int64 `[ages]`, the keys that were freed, by age (see `count_deaths`);
* `L.visible` int64 `[batch, kv_heads]` and `L.held` int64 `[batch]`, the fields `visible` and `full` of a
  `FootprintCount`;
* `L.centre` float32 `[pairs, head_dim]`, where keys are packed in few bits.

Layers are counted among those with attention. A layer of linear attention, the `M`th of the model, has
`states.M.conv_states.N` and `states.M.recurrent_states.N`, as transformers holds them.

`pins` int64 `[rows, ranges, 2]` are pinned positions (see `Pins`).

`tokens` int32 `[batch, tokens]` are the ids of the tokens so far (see `SeenTokens`). Files of format 2 lack them:
their ids are unknown, and padding is taken to be on the left. Files up to format 3 have no budget, no pins and no
rollback. The header names the model, the policy and the gates.
"""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.cache.first_tokens import differing_layer
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.linear_layers import linear_layers, restore_states, states_of
from smartkv.cache.ragged import Fields, Ragged
from smartkv.cache.seen_tokens import PADDING, UNKNOWN
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.io.atomic import write_atomically
from smartkv.io.checks import describe
from smartkv.models.architecture import Fingerprint, check_model
from smartkv.models.wrappers import decoder_blocks, key_devices, language_model
from smartkv.policies.arguments import resolve_gates
from smartkv.policies.floating_price import Prices
from smartkv.policies.hybrid import HybridPolicy

log = logging.getLogger(__name__)

FORMAT_VERSION = 4
READABLE = (2, 3, 4)


def save_cache(cache: LifespanCache, path: str | Path) -> None:
    """Write a cache to a file.

    The cache is settled first: its dead keys are freed. From then on it and the loaded cache give the same logits, bit
    for bit.

    Args:
        cache: a cache that has seen at least one token.
        path: of the file. Folders that it names are made where they are missing.

    Raises:
        SmartKVError: an argument of a wrong type, the cache has seen no token yet, or the file cannot be written.
    """
    if not isinstance(cache, LifespanCache):
        raise SmartKVError(
            f"save_cache expected a LifespanCache, got {describe(cache)}: other caches have no file format"
        )
    path = _path(path, "save_cache(cache, path)")
    if not all(layer.is_initialized for layer in cache.storage):
        raise SmartKVError("the cache has not seen a token yet: there is nothing to save")
    with cache.in_use():
        tensors, header = _contents(cache)
    write_atomically(path, save(tensors, metadata={"smartkv_cache": json.dumps(header, sort_keys=True)}))


def _contents(cache: LifespanCache) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the header of a cache's file."""
    cache.settle()
    header = {
        "format_version": FORMAT_VERSION,
        "fingerprint": asdict(Fingerprint.of(cache.model)),
        "policy": cache.policy.to_dict(),
        "gates": _digest(cache.gates),
        "columns": cache.get_seq_length(),
        "sliding_window": [layer.sliding_window for layer in cache.storage],
        "chunk": cache.chunk,
        "count_from": cache.first_query,
        "bits": cache.bits,
        "budget": None if cache.budget is None else asdict(cache.budget.budget),
        "rollback": cache.rollback,
        "pin_first": cache.pin_first,
        "pin_last_prompt": cache.pin_last_prompt,
        "first_columns": cache.first_columns,
        "dtype": str(cache.storage[0].dtype).removeprefix("torch."),
    }
    tensors: dict[str, Tensor] = {"tokens": cache.seen_tokens.ids.cpu().contiguous(), "pins": cache.pins.ranges}
    for number, layer in enumerate(cache.storage):
        store = layer.store
        tensors_of_layer = {**store.fields._asdict(), "counts": store.counts, "seen": layer.seen}
        tensors_of_layer |= {
            "visible": layer.visible_keys,
            "held": layer.counted().full,
            "centre": layer.packed.centre if layer.packed else None,
            "final": layer.final,
            "prices": torch.stack(layer.limit.prices) if layer.limit.floats else None,
            "budget": layer.limit.budget,
            "deaths": layer.deaths,
        }
        tensors |= {f"{number}.{name}": t.cpu().contiguous() for name, t in tensors_of_layer.items() if t is not None}
    for number, layer in linear_layers(cache.layers).items():
        states = states_of(layer)
        tensors |= {f"states.{number}.{name}": state.cpu().contiguous() for name, state in states.items()}
    return tensors, header


def load_cache(path: str | Path, model: PreTrainedModel, gates: GateBank | str | Path | None = None) -> LifespanCache:
    """Load a cache that `save_cache` wrote, each layer onto the device where the model computes it.

    Args:
        path: of the file.
        model: the same model as when the cache was saved, in the same dtype.
        gates: the same gates, given as for `LifespanCache`.

    Raises:
        SmartKVError: an argument of a wrong type; the file is missing, damaged, or of another model, dtype or gates.
    """
    path = _path(path, "load_cache(path, model, gates)")
    check_model(model)
    lm, devices = language_model(model), key_devices(model)
    header, tensors = _read(path)
    tokens, pins = tensors.pop("tokens", None), tensors.pop("pins", None)
    states = {name: tensors.pop(name) for name in list(tensors) if name.startswith("states.")}
    try:
        if header["format_version"] not in READABLE:
            raise SmartKVError(
                f"{path} has format version {header['format_version']}, "
                f"this SmartKV reads {READABLE[0]} to {READABLE[-1]}"
            )
        fingerprint, here = Fingerprint(**header["fingerprint"]), Fingerprint.of(model)
        here.check(fingerprint, f"the keys in {path}")
        if not (fingerprint.weight_hash and here.weight_hash):
            log.warning("%s: the model's weights cannot be read and compared with those that computed its keys", path)
        elif fingerprint != here:
            raise SmartKVError(f"the keys in {path} were computed by other weights of the same architecture")
        policy = HybridPolicy.from_dict(header["policy"])
        gates = resolve_gates(model, gates)
        if policy.gated and header["gates"] != _digest(gates):
            raise SmartKVError(f"{path} was saved with other gates: give the gates that it was made with")
        if f"torch.{header['dtype']}" != str(lm.dtype):
            raise SmartKVError(f"{path} holds keys for {header['dtype']}, the model computes in {lm.dtype}")
        kept = {name: header[name] for name in ("pin_first", "pin_last_prompt") if name in header}
        cache = LifespanCache(
            model,
            gates,
            policy,
            header["chunk"],
            header["count_from"],
            header["bits"],
            rollback=header.get("rollback", 0),
            **(header.get("budget") or {}),
            **kept,
        )
        cache.first_columns = header.get("first_columns", header["columns"])
        if pins is not None:
            cache.pins.ranges = pins
        for number, layer in enumerate(cache.storage):
            device, stored = devices[number], {n: t for n, t in tensors.items() if _layer(n) == number}
            own = {name.partition(".")[2]: tensor.to(device) for name, tensor in stored.items()}
            fields = Fields(own["key"], own["value"], own["position"], own["expiry"], own.get("score"))
            _check(path, number, fields, own["counts"], own["seen"])
            layer.restore(Ragged(fields, own["counts"]), own["seen"], lm.dtype)
            if layer.packed is not None:
                layer.packed.centre = own["centre"]
                if own["centre"].shape != (len(own["counts"]), cache.architecture.head_dim):
                    raise SmartKVError(f"{path} does not hold a whole cache: the centre of layer {number} does not fit")
            layer.visible_keys = own["visible"]
            layer.set_sliding_window(header["sliding_window"][number])
            layer.columns, layer.final = header["columns"], own.get("final", own["seen"])
            layer.deaths = own.get("deaths", layer.deaths)
            if layer.limit.floats:
                layer.limit.take_over(own["budget"], Prices(*own["prices"]))
        for number, linear in linear_layers(cache.layers).items():
            device = next(decoder_blocks(lm)[number].parameters()).device
            own = {
                n.split(".", 2)[2]: state.to(device) for n, state in states.items() if n.split(".")[1] == str(number)
            }
            if not own:
                raise SmartKVError(f"{path} does not hold a whole cache: the states of layer {number} are missing")
            restore_states(linear, own)
        cache.seen_tokens.restore(_tokens(path, tokens, header["columns"], cache.storage[0].seen))
        if (differs := differing_layer(cache)) is not None:
            raise SmartKVError(
                f"the keys in {path} were computed by other weights of the same architecture, or with another adapter: "
                f"from layer {differs} on this model computes others"
            )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise SmartKVError(f"{path} does not hold a whole cache ({type(error).__name__}: {error})") from error
    return cache


def _tokens(path: Path, tokens: Tensor | None, columns: int, seen: Tensor) -> Tensor:
    """Return the ids of the tokens so far, int32 `[batch, columns]`.

    Args:
        path: of the file, for messages.
        tokens: as in the file; None: the file has none.
        columns: number of tokens so far, padding included.
        seen: int64 `[batch]`, real tokens of each row.
    """
    if tokens is None:
        padding = torch.arange(columns, device=seen.device) < columns - seen[:, None]
        return torch.where(padding, PADDING, UNKNOWN).int()
    if tokens.shape != (len(seen), columns):
        raise SmartKVError(f"{path} does not hold a whole cache: its tokens do not fit its {columns} columns")
    return tokens.to(seen.device)


def _path(path: Any, call: str) -> Path:
    """Return the path of a cache's file; `call` is how it should have been given."""
    if not isinstance(path, str | Path) or not str(path):
        raise SmartKVError(f"the path of a cache's file must be a str or a Path, got {describe(path)}: write {call}")
    return Path(path).expanduser()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a file."""
    try:
        data = path.read_bytes()
        tensors = load(data)  # raises if the file is truncated
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        return json.loads(metadata["smartkv_cache"]), tensors
    except OSError as error:
        raise SmartKVError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise SmartKVError(f"{path} is damaged, or no safetensors file ({error})") from error
    except (KeyError, ValueError) as error:
        raise SmartKVError(f"{path} is a safetensors file, but not a cache that save_cache wrote") from error


def _layer(name: str) -> int:
    """Return the layer in a tensor's name."""
    return int(name.partition(".")[0])


def _check(path: Path, layer: int, fields: Fields, counts: Tensor, seen: Tensor) -> None:
    """Raise if tensors do not fit together, because they would later be read beyond their ends."""
    keys = int(counts.sum())
    fits = bool((counts >= 0).all()) and len(seen) > 0 and len(counts) % len(seen) == 0
    fits &= all(tensor is None or tensor.shape[0] == keys for tensor in fields)
    fits &= fields.key.dim() == fields.value.dim() == 2
    if fields.key.dtype != torch.uint8:  # packed keys and values may have different numbers of bits
        fits &= fields.key.shape == fields.value.shape
    if not fits:
        raise SmartKVError(f"{path} does not hold a whole cache: the tensors of layer {layer} do not fit together")


def _digest(gates: GateBank | None) -> str | None:
    """Return a hash of the gates' weights; None without gates."""
    if gates is None:
        return None
    digest = hashlib.sha256()
    for _, tensor in sorted(gates.state_dict().items()):
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]
