"""`python -m eval generate`: complete a text or chat with an evicting cache, and write a page of what it kept."""

import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from eval.chat.conversation import Conversation, check_room, encode
from eval.chat.page import write_page
from eval.chat.terminal import ask, is_terminal
from eval.common.options import CalibrationWindows, Model, Sampling
from eval.common.results import write_result
from eval.common.score_scale import ScoreScale
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.pretrained import pretrained_gates
from smartkv.labels.lifespans import check_window
from smartkv.metrics.perplexity import full_cache_bytes
from smartkv.models.architecture import Architecture
from smartkv.models.backbone import Backbone
from smartkv.models.key_hooks import read_keys
from smartkv.policies.budgets import Calibration, policy_of, solve
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.named import read_policy
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import plan_windows

SHIPPED = "auto"  # gates that come with SmartKV for the model


def generate(
    out: str,
    gates: str | None = SHIPPED,
    prompt: str | None = None,
    prompt_file: str | None = None,
    chat: bool = False,
    policy: str | None = None,
    footprint: float = 0.25,
    price: float | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - jsonargparse shows it
    calibration: CalibrationWindows = CalibrationWindows([SourceConfig("builtin")], windows=2),  # noqa: B008
    model: Model = Model(),  # noqa: B008
    seed: int = 0,
) -> None:
    """Complete a text or chat with a cache that evicts.

    Without a prompt, lines are read from the terminal: an empty one or Ctrl-D ends, Ctrl-C stops an answer.

    Args:
        out: folder for generate.json and lifespans.html, the text coloured by what the gates predict. Without chat
            each line is a text of its own, and the last one is written.
        gates: folder of exported gates, hub id, or the name of gates that come with SmartKV. Auto: those that come with
            SmartKV for this model, none for other models. Null: only policies without gates.
        prompt: text to go on with, or to answer.
        prompt_file: a file that holds it.
        chat: answer by the model's chat template; one cache for the whole conversation.
        policy: named (all-gated, default, lifespan, window, full) or a YAML file. Null: the one that is stored with the
            gates, and all-gated for gates without one.
        footprint: share of the full cache's keys. Gates that remember prices have one for it; else the policy's open
            windows and price are solved for it.
        price: of a key, in place of that: the prediction above which it stays, in the unit of the gates (log4 of tokens
            for gates that predict lifespans, log of nats for gates that judge for ages).
        sampling: how an answer is generated.
        calibration: texts on which open windows and an open price are solved.
        model: the frozen language model.
        seed: of sampling, and of the choice of windows.
    """
    text = _prompt(prompt, prompt_file)
    _check(sampling, min(calibration.window - 1, calibration.windows))
    architecture = model.architecture()
    gates = _shipped(architecture) if gates == SHIPPED else gates
    bank = GateBank.from_pretrained(gates) if gates else None
    chosen = _policy(policy, price, footprint, bank, architecture.layers)
    chosen.check(architecture, bank)
    if chosen.open and not 0 < footprint <= 1:
        raise SmartKVError(f"a footprint is a share of the full cache above 0 and at most 1, got {footprint}")
    if not is_terminal():  # stdout has the answer alone, and stderr one line
        disable_progress_bar()
    lm = model.load()
    if bank is not None:
        lm.fingerprint.check(bank.fingerprint, f"the gates in {gates}")
        bank = bank.to(model.device)
    first = encode(lm.tokenizer, text or "…", chat, first=True)  # an error here comes before anything takes long
    check_room(len(first), sampling.max_new_tokens, architecture.max_positions)
    texts = []
    if chosen.open:
        check_window(lm.model, calibration.window)
        counts = {"train": calibration.windows}
        plan = plan_windows(calibration.sources, counts, lm.tokenizer, calibration.window, seed=seed, say=_tell)
        chosen = solve(chosen, footprint, _calibration(lm, bank if chosen.gated else None, plan.of_split("train")))
        texts = plan.sources
    torch.manual_seed(seed)
    scale = ScoreScale.of(bank)
    _tell(_describe(chosen, scale, gates))
    conversation = _talk(lm, bank, chosen, text, chat, _generation(lm, sampling))
    if conversation is None:
        return
    settings = {
        "backbone": model.backbone,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "gates": gates,
        "chat": chat,
        "policy": chosen.to_dict(),
        "footprint": footprint,
        **asdict(sampling),
        "texts": texts,
        "calibration_window": calibration.window,
        "calibration_windows": calibration.windows,
        "seed": seed,
    }
    figures = _figures(conversation)
    result = write_result(Path(out), "generate", settings, figures)
    page = write_page(
        Path(out) / "lifespans.html",
        conversation.token_texts(),
        *conversation.cache.decisions(len(conversation.ids)),
        policy=chosen,
        model=lm.name,
        generated=conversation.generated,
        scale=scale,
    )
    _tell(str(result))
    print(f"{conversation.status(figures['ms_per_token'])} · {page}", file=sys.stderr)


def _prompt(prompt: str | None, prompt_file: str | None) -> str | None:
    """Return the text to begin with; None if lines are to be read from the terminal."""
    if prompt is not None and prompt_file is not None:
        raise SmartKVError("prompt and prompt_file are both given: give one of them")
    if prompt_file is not None:
        try:
            prompt = Path(prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SmartKVError(f"{prompt_file} cannot be read ({type(error).__name__}): give a UTF-8 file") from error
    if prompt is not None and not prompt.strip():
        raise SmartKVError("the prompt is empty: give some text, or leave it out to type lines")
    return prompt


def _check(sampling: Sampling, calibration: int) -> None:
    if sampling.max_new_tokens < 0:
        raise SmartKVError(f"max_new_tokens must be 0 or more, got {sampling.max_new_tokens}")
    if not 0 <= sampling.temperature < float("inf"):
        raise SmartKVError(f"temperature must be 0 (the likeliest token) or above, got {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise SmartKVError(f"top_p must be above 0 and at most 1, got {sampling.top_p}")
    if calibration < 1:
        raise SmartKVError("calibration needs at least 1 window of at least 2 tokens")


def _shipped(architecture: Architecture) -> str | None:
    """Return the name of the gates that come with SmartKV for a model of this architecture; None: there are none."""
    shape = (architecture.model_type, architecture.layers, architecture.kv_heads, architecture.head_dim)
    for name in pretrained_gates():
        made_for = GateBank.from_pretrained(name).fingerprint
        if shape == (made_for.model_type, made_for.layers, made_for.kv_heads, made_for.head_dim):
            return name
    return None


def _policy(
    name: str | None, price: float | None, footprint: float, gates: GateBank | None, layers: int
) -> HybridPolicy:
    """Return the policy of a name, else the one stored with the gates, with a price that is given or remembered."""
    stored = gates.details if gates is not None and name is None else {}
    if "policy" not in stored:
        chosen = read_policy(name or "all-gated", layers)
    elif price is None and gates is not None and stored.get("prices"):
        return policy_of(gates, footprint)
    else:
        chosen = HybridPolicy.from_dict(stored["policy"])
    if price is None:
        return chosen
    if not chosen.gated:
        raise SmartKVError(f"policy '{chosen.name}' asks no gates: it takes no price")
    return replace(chosen, price=price)


@torch.inference_mode()
def _calibration(lm: Backbone, gates: GateBank | None, windows: torch.Tensor) -> Calibration:
    """Read windows `[windows, tokens]` with a full cache; a terminal shows how far it is."""
    if gates is None:
        return Calibration.without_gates(lm.architecture.layers, windows.shape[1])
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        shown = progress.track(windows, description="Solving the price")
        return Calibration.of(gates, [read_keys(lm.model, ids) for ids in shown])


def _generation(lm: Backbone, sampling: Sampling) -> GenerationConfig | None:
    """Return settings that sample by temperature and top_p alone; None where nothing is to be generated.

    The model's own generation settings are left out.
    """
    if sampling.max_new_tokens == 0:
        return None
    # the defaults, which greedy search does not read
    plain = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=1.0,
        pad_token_id=lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id,
        **(drawn if sampling.temperature > 0 else plain),
    )


def _talk(
    lm: Backbone,
    gates: GateBank | None,
    policy: HybridPolicy,
    text: str | None,
    chat: bool,
    generation: GenerationConfig | None,
) -> Conversation | None:
    """Answer the text, or line after line from the terminal.

    Returns:
        The last conversation; None if no line was entered.
    """
    conversation = None
    if text is not None:
        conversation = Conversation(lm, gates, policy, chat)
        conversation.say(text, generation)
        return conversation
    while (line := ask()) is not None:
        current = conversation if conversation is not None and chat else Conversation(lm, gates, policy, chat)
        try:
            turn = current.say(line, generation)
        except SmartKVError as error:  # the conversation goes on after a line that does not fit
            print(f"error: {error}", file=sys.stderr)
            continue
        conversation = current
        _tell(conversation.status(turn.ms_per_token))
    return conversation


def _describe(policy: HybridPolicy, scale: ScoreScale, gates: str | None) -> str:
    """Return the policy in words, its prices in the unit of the gates."""
    gated = [rule for rule in policy.rules if rule.rule == "gated"]
    windows = sorted({rule.window for rule in policy.rules if rule.window is not None})
    prices = sorted({price for rule in gated if (price := _price(rule, policy)) is not None and math.isfinite(price)})
    parts = [f"policy {policy.name}"]
    if gated:
        parts.append(f"gates {gates}")
    if windows:
        parts.append(f"window {windows[0]}" if len(windows) == 1 else f"windows {windows[0]}-{windows[-1]}")
    return ", ".join([*parts, *map(scale.describe_price, prices)])


def _price(rule: LayerRule, policy: HybridPolicy) -> float | None:
    return policy.price if rule.price is None else rule.price


def _figures(conversation: Conversation) -> dict[str, Any]:
    cache, tokens = conversation.cache, conversation.cache.get_seq_length()
    times = [(turn.ms_per_token, turn.new_tokens - 1) for turn in conversation.turns if turn.ms_per_token is not None]
    return {
        "units": {
            "kv_bytes": "bytes of keys, values and what belongs to them, all layers",
            "footprint": "keys seen ÷ keys of a full cache, over all queries",
            "bytes_by_layer": "bytes at the end, dead slots and tables included",
            "live_keys_by_layer": "keys at the end, mean over KV heads",
            "ms_per_token": "milliseconds a token after each answer's first",
            "tokens": "tokens that the cache has read; the last one made is not among them",
        },
        "turns": [asdict(turn) for turn in conversation.turns],
        "text": conversation.lm.tokenizer.decode(conversation.ids),
        "tokens": tokens,
        "kv_bytes": {
            "live": cache.storage_bytes,
            "peak": cache.peak_bytes,
            "full": full_cache_bytes(conversation.lm.model, tokens),
        },
        "footprint": cache.footprint,
        "bytes_by_layer": cache.bytes_by_layer.tolist(),
        "live_keys_by_layer": cache.live_keys.double().mean(dim=(1, 2)).tolist(),
        "ms_per_token": sum(ms * n for ms, n in times) / sum(n for _, n in times) if times else None,
    }


def _tell(line: str) -> None:
    """Print a line to stderr on a terminal; elsewhere only the last line of the command is printed."""
    if is_terminal():
        print(line, file=sys.stderr)
