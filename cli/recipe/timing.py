"""Times one piece of each kind of work on this machine, for an estimate of the whole."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cli.recipe.settings import BIG_VOCABULARY, Amounts
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.distillation.kl_divergence import divergence
from smartkv.distillation.soft_attention import soft_eviction
from smartkv.distillation.soft_keep import keep_share
from smartkv.gates.bank import GateBank
from smartkv.labels.lifespans import LabelSpec, label_window
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.models.key_site_check import check_key_site
from smartkv.policies.hybrid import HybridPolicy, LayerRule

THRESHOLDS = (0.02, 0.05, 0.11)  # of the harvest's template
ROWS = 1024  # keys a head and step of the gates' training, as in its template
AGES, SINKS, HIDDEN, WIDE = (16, 64, 256), 4, 64, 128  # of the templates


def time_backbone(backbone: str, dtype: str, device: str, trust_remote_code: bool, amounts: Amounts) -> dict[str, Any]:
    """Load a model, check where its keys are read, and time the pieces that the steps consist of.

    Args:
        backbone, dtype, device, trust_remote_code: as for `load_backbone`.
        amounts: lengths of windows.

    Returns:
        `site`: submodule whose output is the key; `scored_tokens`: queries of a window that the distillation
        should compare with the full cache; `seconds`, see `time_work`; `gpu_bytes`: largest memory on a GPU.
    """
    lm = load_backbone(backbone, dtype, device, trust_remote_code)
    embeddings: Any = lm.model.get_input_embeddings()
    scored = 256 if embeddings.num_embeddings >= BIG_VOCABULARY else 512
    site = check_key_site(lm)["module"]
    seconds = time_work(lm, amounts, scored)
    on_gpu = torch.device(device).type == "cuda"
    gpu_bytes = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {"site": site, "scored_tokens": scored, "seconds": seconds, "gpu_bytes": gpu_bytes}


def time_work(lm: Backbone, amounts: Amounts, scored: int) -> dict[str, float]:
    """Time the pieces that the steps consist of, on random tokens.

    Args:
        lm: the frozen model.
        amounts: lengths of windows.
        scored: queries of a window that the distillation compares with the full cache.

    Returns:
        Seconds of a window's labels (`harvest`), of a step of the lifespan gates (`gates`), of a step of the
        distillation (`distilled`), of a forward pass of its window (`forward`), and of a window of the report read by a
        cache that evicts (`report`).
    """
    generator = torch.Generator().manual_seed(0)
    embeddings: Any = lm.model.get_input_embeddings()
    ids = torch.randint(embeddings.num_embeddings, (amounts.window,), generator=generator).to(lm.model.device)
    short = ids[: amounts.short_window]
    base: Any = lm.model.base_model
    gated = lm.architecture.gated_layers
    with torch.inference_mode():
        base(input_ids=short[None, :16], use_cache=False)  # the first call of a process is slow
    spec = LabelSpec(THRESHOLDS, (), amounts.follow_up)
    seconds = {"harvest": _seconds(lambda: label_window(lm.model, ids, spec))}
    bank = GateBank(lm.fingerprint, gated, HIDDEN).to(lm.model.device)
    keys = torch.randn(len(bank), ROWS, lm.fingerprint.head_dim, device=lm.model.device)
    seconds["gates"] = _seconds(lambda: bank(keys).square().mean().backward())
    with torch.inference_mode():
        seconds["forward"] = _seconds(lambda: base(input_ids=short[None], use_cache=False))
    policy = HybridPolicy((LayerRule("all", "window", max(1, amounts.window // 4)),), sinks=SINKS)

    def read() -> None:
        with LifespanCache(lm.model, None, policy, rollback=0) as cache, torch.inference_mode():
            lm.model(ids[None], past_key_values=cache)

    seconds["report"] = _seconds(read)
    wide = GateBank(lm.fingerprint, gated, WIDE, len(AGES), {"ages": list(AGES)}).to(lm.model.device)
    seconds["distilled"] = _seconds(lambda: _distil(lm, wide, short, scored))
    return seconds


def _distil(lm: Backbone, bank: GateBank, ids: Tensor, scored: int) -> None:
    """Compute the gradient of one step of the distillation."""
    base: Any = lm.model.base_model
    places = torch.arange(len(ids))[-scored:]

    def log_keep(layer: int, keys: Tensor) -> Tensor | None:
        if layer not in bank.layers:
            return None
        _, log = keep_share(bank.predict(layer, keys.detach()), 0.0, 0.5)
        return log.movedim(-1, 0)

    with torch.no_grad():
        teacher = base(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    with soft_eviction(lm.model, log_keep, AGES, SINKS):
        hidden = base(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    divergence(hidden[places], teacher[places], lm.model.get_output_embeddings()).backward()


def _seconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
