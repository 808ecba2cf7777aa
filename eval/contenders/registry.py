"""The contenders by their names."""

import re
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from eval.contenders.base import Contender, EvictionProtocol, FullCache
from eval.contenders.baselines import BASELINES, SEEDS, baseline
from eval.contenders.kvpress import PREFIX, PressContender
from eval.contenders.policies import PolicyContender
from eval.contenders.quantised import QuantisedContender
from eval.contenders.scored import GateScores, ScoredContender, Scores
from smartkv.baselines.oracles import oracle_labels
from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.labels.lifespans import log4_lifespan
from smartkv.metrics.nulls import TableNull
from smartkv.metrics.perplexity import query_before
from smartkv.models.backbone import Backbone
from smartkv.policies.budgets import Calibration
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.named import read_policy
from smartkv.quantization.affine import check_bits

NULLS = ("null:constant", "null:position", "null:token_table")
ORACLES = ("oracle:lifespan", "oracle:attention")
QUANTISED = "quant:"
ADAPTIVE_BY_GATES = "quant:adaptive_gates"
OWN = "gates"  # the policy that goes with the gates
DEFAULT = (OWN, "window", *BASELINES, *NULLS, *ORACLES)
WINDOW = 32  # tokens that stay in any case, of nulls and oracles


def make_contenders(
    names: Sequence[str],
    lm: Backbone,
    gates: GateBank | None,
    windows: Sequence[Tensor],
    first_token: int,
    protocol: EvictionProtocol = "stream",
    prefill: int = 1024,
) -> list[Contender]:
    """The full cache, and who is named.

    Args:
        names: see `eval.eviction.compare.compare`.
        windows: training texts, ids `[tokens]` each, all of one length: on them prices are solved, and nulls learn.
        first_token: tokens are scored from this one on.
        protocol: stream or once.
        prefill: tokens, for protocol once.

    Raises:
        SmartKVError: a name that is none, or one that needs gates where there are none.
    """
    tokens = len(windows[0])
    counted = prefill if protocol == "once" else query_before(first_token)
    found: list[Contender] = [FullCache(lm)]
    calibrate = cache(
        lambda with_gates: Calibration.measure(
            lm.model, gates if with_gates else None, windows, query_before(first_token)
        )
    )

    def scored(
        name: str, kind: str, needs: str, scores: Scores, lifespans: bool = False, window: int = WINDOW
    ) -> ScoredContender:
        lifespans = lifespans and protocol == "stream"
        return ScoredContender(lm, name, kind, needs, scores, windows, counted, window, 4, lifespans, protocol)

    for name in dict.fromkeys(names):
        if name.startswith(PREFIX):
            if protocol != "once":
                raise SmartKVError(f"contender '{name}' compresses once, after the prefill: it is for --protocol once")
            found.append(PressContender(lm, gates, name, windows, prefill))
        elif name in BASELINES:
            for seed in SEEDS if name == "random" else SEEDS[:1]:
                found.append(baseline(name, lm, tokens, first_token, protocol, seed))
        elif name.startswith(QUANTISED):
            found.append(_quantised(lm, gates, name))
        elif name in NULLS:
            table = _learnt(lm, windows, name.removeprefix("null:"))
            found.append(scored(name, "null", "nothing", table, lifespans=name == "null:constant"))
        elif name in ORACLES:
            found.append(scored(name, "oracle", "the text to come", _foresight(lm, name), name == "oracle:lifespan"))
        elif name.startswith(("null:", "oracle:")):
            raise SmartKVError(f"there is no '{name}': expected {', '.join((*NULLS, *ORACLES))}")
        else:
            name, bits = _packed(name)
            policy = _own(gates) if name == OWN else read_policy(name, lm.architecture.layers)
            if bits and protocol == "once":
                raise SmartKVError(f"contender '{name}' packs while it reads: it is for --protocol stream")
            policy.check(lm.architecture, gates)
            if protocol == "once" and policy.gated:
                found.append(scored(name, "ours", "keys", _remembered(GateScores(lm, gates))))
            elif protocol == "once":
                found.append(scored(name, "rule", "nothing", _recency(lm)))
            else:
                kind = "ours" if policy.gated else "rule"
                found.append(PolicyContender(lm, gates, policy, partial(calibrate, policy.gated), kind, bits))
    return found


def _packed(name: str) -> tuple[str, tuple[int, int] | None]:
    """A policy's name without `+4bit` or `+k6v4`, and the bits of keys and values."""
    plain, _, ending = name.rpartition("+")
    found = re.fullmatch(r"(\d)bit|k(\d)v(\d)", ending)
    if not plain or found is None:
        return name, None
    both, key, value = found.groups()
    return plain, (check_bits(int(both or key)), check_bits(int(both or value)))


def _quantised(lm: Backbone, gates: GateBank | None, name: str) -> QuantisedContender:
    scheme = name.removeprefix(QUANTISED)
    if scheme == "adaptive":
        return QuantisedContender(lm, name, lambda: AdaptiveCache(lm.model), "attention weights")
    if name == ADAPTIVE_BY_GATES:
        if gates is None:
            raise SmartKVError(f"contender '{name}' needs gates: give --gates")
        return QuantisedContender(lm, name, lambda: AdaptiveCache(lm.model, gates), "keys")
    codec, mark, latest = scheme.partition("@")
    if mark and not latest.isdigit():
        raise SmartKVError(f"contender '{name}' has no number of tokens after '@', such as quant:kivi2@32")
    residual = int(latest) if mark else None
    QuantizedCache(lm.model, codec, residual)  # a name that is none is told here
    return QuantisedContender(lm, name, lambda: QuantizedCache(lm.model, codec, residual))


def _own(gates: GateBank | None) -> HybridPolicy:
    if gates is None:
        raise SmartKVError(f"contender '{OWN}' is the policy that goes with gates: give --gates")
    if "policy" not in gates.details:
        raise SmartKVError("no policy goes with these gates: name one, such as all-gated, in place of 'gates'")
    return HybridPolicy.from_dict(gates.details["policy"] | {"name": OWN})


def _recency(lm: Backbone) -> Scores:
    arch = lm.architecture
    return lambda tokens: torch.arange(len(tokens)).float().expand(arch.layers, arch.kv_heads, -1).clone()


def _foresight(lm: Backbone, name: str) -> Scores:
    """True lifespans or future attention."""

    @_remembered
    def scores(tokens: Tensor) -> Tensor:
        found = oracle_labels(lm.model, tokens, WINDOW)
        return log4_lifespan(found.lifespan, len(tokens)) if name == "oracle:lifespan" else found.attention

    return scores


def _learnt(lm: Backbone, windows: Sequence[Tensor], by: str) -> Scores:
    """Mean log4 lifespan of the training keys by head, and by position or token; keys of the first half of the windows,
    which were followed up for as long as half a window."""
    arch = lm.architecture
    half = len(windows[0]) // 2
    bins = {"constant": 1, "position": len(windows[0]), "token_table": len(lm.tokenizer)}[by]
    null = TableNull(arch.layers * arch.kv_heads, bins, by, width=len(windows[0]) // 32 if by == "position" else 1)
    position = torch.arange(half)
    for tokens in windows:
        lifespan = oracle_labels(lm.model, tokens, WINDOW).lifespan[..., :half].flatten(0, 1)
        null.update(log4_lifespan(lifespan, half), position, tokens[:half])

    def scores(tokens: Tensor) -> Tensor:
        place = torch.arange(len(tokens)).clamp(max=half - 1)
        return null.predict(place, tokens).float().unflatten(0, (arch.layers, arch.kv_heads))

    return scores


def _remembered(scores: Callable[[Tensor], Tensor]) -> Scores:
    """What takes a forward pass is kept, float32 `[layers, kv_heads, tokens]` a text, for the next footprint."""
    known: dict[bytes, Tensor] = {}

    def remembered(tokens: Tensor) -> Tensor:
        key = tokens.numpy().tobytes()
        if key not in known:
            known[key] = scores(tokens)
        return known[key]

    return remembered
