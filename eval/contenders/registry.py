"""Contenders by name: makes the objects that a list of names asks for."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from eval.common.options import Model
from eval.contenders.base import Contender, EvictionProtocol, FullCache
from eval.contenders.baselines import BASELINES, SEEDS, baseline
from eval.contenders.kvpress import PREFIX, PressContender, check_press
from eval.contenders.policies import BUDGET, PINNED, RANDOM, BudgetContender, PolicyContender
from eval.contenders.quantised import QuantisedContender
from eval.contenders.scored import GateScores, ScoredContender, Scores
from smartkv.baselines.oracles import oracle_labels
from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.arguments import own_policy
from smartkv.cache.quantized_cache import QuantizedCache, QuantizedLayer, scheme
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.labels.lifespans import log4_lifespan
from smartkv.metrics.nulls import TableNull
from smartkv.metrics.perplexity import query_before
from smartkv.models.architecture import Architecture
from smartkv.models.backbone import Backbone
from smartkv.policies.budgets import Calibration
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.named import read_policy
from smartkv.quantization.affine import check_bits

NULLS = ("null:constant", "null:position", "null:token_table")
ORACLES = ("oracle:lifespan", "oracle:attention")
QUANTISED = "quant:"
ADAPTIVE, ADAPTIVE_BY_GATES = "quant:adaptive", "quant:adaptive_gates"
OWN_POLICY = "gates"  # the policy that is stored with the gates
DEFAULT = (OWN_POLICY, "window", *BASELINES, *NULLS, *ORACLES)
WINDOW = 32  # number of latest tokens that nulls and oracles always keep


def make_contenders(
    names: Sequence[str],
    lm: Backbone,
    gates: GateBank | None,
    windows: Sequence[Tensor],
    first_token: int,
    protocol: EvictionProtocol = "stream",
    prefill: int = 1024,
) -> list[Contender]:
    """Make the contenders of some names, the full cache before them.

    Args:
        names: see `eval.eviction.compare.compare`.
        lm: the model.
        gates: None: there are none.
        windows: training texts, ids `[tokens]` each, all of one length. Prices are solved on them, and nulls learn from
            them.
        first_token: tokens from this one on are scored.
        protocol: stream or once.
        prefill: tokens of the prefill, for protocol once.

    Raises:
        SmartKVError: see `check_contenders`.
    """
    check_contenders(names, lm.architecture, gates, protocol, prompts=True)
    tokens = len(windows[0])
    counted = prefill if protocol == "once" else query_before(first_token)
    contenders: list[Contender] = [FullCache(lm)]
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
            contenders.append(PressContender(lm, gates, name, windows, prefill))
        elif name in BASELINES:
            for seed in SEEDS if name == "random" else SEEDS[:1]:
                contenders.append(baseline(name, lm, tokens, first_token, protocol, seed))
        elif name.startswith(QUANTISED):
            contenders.append(_quantised(lm, gates, name))
        elif name in NULLS:
            table = _learned_null(lm, windows, name.removeprefix("null:"))
            contenders.append(scored(name, "null", "nothing", table, lifespans=name == "null:constant"))
        elif name in ORACLES:
            contenders.append(
                scored(name, "oracle", "the text to come", _true_labels(lm, name), name == "oracle:lifespan")
            )
        else:
            pinned = name.endswith(PINNED)
            name, bits = _without_bits(name.removesuffix(PINNED))
            if name == RANDOM + BUDGET:
                contenders.append(BudgetContender(lm, None, None, bits, pinned=pinned))
                continue
            policy = policy_called(name, lm.architecture, gates)
            if name.endswith(BUDGET):
                contenders.append(BudgetContender(lm, gates, policy, bits, pinned=pinned))
                continue
            if protocol == "once" and policy.gated:
                contenders.append(scored(name, "ours", "keys", _gate_scores(lm, gates)))
            elif protocol == "once":
                contenders.append(scored(name, "rule", "nothing", _recency(lm)))
            else:
                kind = "ours" if policy.gated else "rule"
                calibrated = partial(calibrate, policy.gated)
                contenders.append(PolicyContender(lm, gates, policy, calibrated, kind, bits, pinned=pinned))
    return contenders


def names_or_default(names: Sequence[str] | None, default: Sequence[str], gates: str | None) -> list[str]:
    """Return the names that are given, else the default ones; without gates none that is a policy stored with them."""
    return list(names) if names is not None else [name for name in default if gates or name != OWN_POLICY]


def check_contenders(
    names: Sequence[str],
    model: Architecture,
    gates: GateBank | None,
    protocol: EvictionProtocol = "stream",
    prompts: bool = False,
) -> None:
    """Check that all names are those of contenders, before a model or a text is loaded for them.

    Args:
        names: see `eval.eviction.compare.compare`.
        model: architecture of the model.
        gates: None: there are none.
        protocol: stream or once.
        prompts: whether the texts are prompts, of which instruction and question are known.

    Raises:
        SmartKVError: an unknown name, a name that needs gates when there are none, or one of the other protocol.
    """
    for name in names:
        if name.startswith(PREFIX):
            if protocol != "once":
                raise SmartKVError(f"contender '{name}' compresses once, after the prefill: it is for --protocol once")
            check_press(name, gates)
        elif name.startswith(QUANTISED):
            if name == ADAPTIVE_BY_GATES and gates is None:
                raise SmartKVError(f"contender '{name}' needs gates: give --gates")
            if name not in (ADAPTIVE, ADAPTIVE_BY_GATES):
                codec, residual = _codec(name)
                chosen, usual = scheme(codec)
                QuantizedLayer(chosen, usual if residual is None else residual)
        elif name.startswith(("null:", "oracle:")):
            if name not in (*NULLS, *ORACLES):
                raise SmartKVError(f"there is no contender '{name}': expected {', '.join((*NULLS, *ORACLES))}")
        elif name not in BASELINES:
            plain, bits = _without_bits(name.removesuffix(PINNED))
            if name.endswith(PINNED) and (protocol == "once" or not prompts):
                raise SmartKVError(
                    f"contender '{name}' keeps instruction and question of a prompt while it reads: it is for the "
                    "tasks needle, ruler and reasoning"
                )
            if bits and protocol == "once":
                raise SmartKVError(f"contender '{name}' packs while it reads: it is for --protocol stream")
            if plain.endswith(BUDGET) and protocol == "once":
                raise SmartKVError(f"contender '{name}' holds its budget while it reads: it is for --protocol stream")
            if plain != RANDOM + BUDGET:
                policy_called(plain, model, gates)


def load_for(
    names: Sequence[str],
    model: Model,
    gates: str | None,
    protocol: EvictionProtocol = "stream",
    prompts: bool = False,
) -> tuple[Backbone, GateBank | None]:
    """Load a model and its gates, after checking all names of contenders by the model's config.

    Args:
        names, protocol, prompts: as for `check_contenders`.
        model: the frozen language model.
        gates: folder of exported gates, hub id or name; None: no gates.

    Raises:
        SmartKVError: as `check_contenders`; or a model or gates that cannot be loaded, or do not fit together.
    """
    bank = GateBank.from_pretrained(gates) if gates else None
    check_contenders(names, model.architecture(), bank, protocol, prompts)
    lm = model.load()
    return lm, GateBank.from_pretrained(gates, lm.model).to(model.device) if gates else None


def _without_bits(name: str) -> tuple[str, tuple[int, int] | None]:
    """Split a name such as `gates+4bit` or `gates+k6v4` into the policy's name and the bits of keys and of values."""
    plain, _, ending = name.rpartition("+")
    match = re.fullmatch(r"(\d)bit|k(\d)v(\d)", ending)
    if not plain or match is None:
        return name, None
    both, key, value = match.groups()
    return plain, (check_bits(int(both or key)), check_bits(int(both or value)))


def _codec(name: str) -> tuple[str, int | None]:
    """Split a name such as `quant:kivi2@32` into the codec's name and the number of latest tokens that stay exact."""
    codec, mark, latest = name.removeprefix(QUANTISED).partition("@")
    if mark and not latest.isdigit():
        raise SmartKVError(f"contender '{name}' has no number of tokens after '@', such as quant:kivi2@32")
    return codec, int(latest) if mark else None


def _quantised(lm: Backbone, gates: GateBank | None, name: str) -> QuantisedContender:
    if name == ADAPTIVE:
        return QuantisedContender(lm, name, lambda: AdaptiveCache(lm.model), "attention weights")
    if name == ADAPTIVE_BY_GATES:
        return QuantisedContender(lm, name, lambda: AdaptiveCache(lm.model, gates), "keys")
    codec, residual = _codec(name)
    return QuantisedContender(lm, name, lambda: QuantizedCache(lm.model, codec, residual))


def policy_called(name: str, model: Architecture, gates: GateBank | None) -> HybridPolicy:
    """Return the policy of a name, which fits the model and the gates.

    Args:
        name: `gates`, the policy that is stored with the gates; a named policy; or a YAML file. With `@budget` behind
            it, its price is open.
        model: architecture of the model.
        gates: None: there are none.

    Raises:
        SmartKVError: there is no such policy, it does not fit, or a budget cannot move it.
    """
    plain = name.removesuffix(BUDGET)
    if gates is not None and name == OWN_POLICY + BUDGET:
        policy = replace(own_policy(gates), name=OWN_POLICY)
    else:
        policy = _own_policy(gates) if plain == OWN_POLICY else read_policy(plain, model.layers)
    policy.check(model, gates)
    if plain != name and policy.open != "price":
        raise SmartKVError(
            f"contender '{name}' needs a policy that leaves its price open, '{plain}' leaves "
            f"{policy.open or 'nothing'} open: expected {OWN_POLICY}{BUDGET}"
        )
    return policy


def _own_policy(gates: GateBank | None) -> HybridPolicy:
    """Read the policy that is stored with the gates."""
    if gates is None:
        raise SmartKVError(
            f"contender '{OWN_POLICY}' is the policy that is stored with the gates, and there are none: give --gates"
        )
    if "policy" not in gates.details:
        raise SmartKVError(
            "these gates have no policy stored with them: name one, such as all-gated, in place of 'gates'"
        )
    return HybridPolicy.from_dict(gates.details["policy"] | {"name": OWN_POLICY})


def _gate_scores(lm: Backbone, gates: GateBank | None) -> Scores:
    """Scores of the gates; a policy that has passed its `check` asks none that are missing."""
    if gates is None:
        raise SmartKVError("a policy that asks gates needs some: give --gates")
    return _remembered(GateScores(lm, gates))


def _recency(lm: Backbone) -> Scores:
    """Scores by which later keys stay."""
    arch = lm.architecture
    return lambda tokens: torch.arange(len(tokens)).float().expand(arch.layers, arch.kv_heads, -1).clone()


def _true_labels(lm: Backbone, name: str) -> Scores:
    """Scores that an oracle takes from the text to come: true lifespans in log4, or future attention."""

    @_remembered
    def scores(tokens: Tensor) -> Tensor:
        labels = oracle_labels(lm.model, tokens, WINDOW)
        return log4_lifespan(labels.lifespan, len(tokens)) if name == "oracle:lifespan" else labels.attention

    return scores


def _learned_null(lm: Backbone, windows: Sequence[Tensor], by: str) -> Scores:
    """Scores of a null: the mean log4 lifespan of training keys by head, and by position or token.

    Only keys of the first half of each window count, because all of them are followed up for half a window.
    """
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
    """Remember the scores of each text, which take a forward pass, for the next footprint."""
    known: dict[bytes, Tensor] = {}

    def remembered(tokens: Tensor) -> Tensor:
        key = tokens.numpy().tobytes()
        if key not in known:
            known[key] = scores(tokens)
        return known[key]

    return remembered
