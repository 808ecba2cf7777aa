"""`python -m eval generate`: complete a text or chat with an evicting cache, and write a page of what it kept."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from eval.chat.choice import Choice, choose, shipped_gates
from eval.chat.conversation import Conversation, check_room, encode
from eval.chat.page import write_page
from eval.chat.terminal import ask, is_terminal
from eval.common.options import CalibrationWindows, Model, Sampling
from eval.common.results import write_result
from eval.common.score_scale import ScoreScale
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.labels.lifespans import check_window
from smartkv.metrics.perplexity import full_cache_bytes
from smartkv.models.backbone import Backbone
from smartkv.models.key_hooks import read_keys
from smartkv.policies.budgets import Calibration
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
    footprint: float | None = None,
    max_tokens: int | None = None,
    max_bytes: str | None = None,
    plan: int | None = None,
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
        policy: named (all-gated, default, lifespan, window, full) or a YAML file: its open windows and price are solved
            for the footprint. Null: the one that is stored with the gates (all-gated for gates without one) under a
            budget, which its price is moved to hold.
        footprint: budget as a share of the full cache's keys at the planned length. Null: a quarter, if no other figure
            says how much may be kept.
        max_tokens: budget as keys a KV head, in place of a footprint.
        max_bytes: budget as bytes, such as 20MB, in place of a footprint.
        plan: length in tokens, prompt and answer, of which the footprint is a share. Null: those of the prompt and of
            max_new_tokens; 2,048 for a chat. A longer text stays within the same budget.
        price: of a key, in place of all that: the prediction above which it stays, in the unit of the gates (log4 of
            tokens for gates that predict lifespans, log of nats for gates that judge for ages).
        sampling: how an answer is generated.
        calibration: texts on which open windows, an open price and, for gates that do not remember it, each layer's
            part of a budget are solved.
        model: the frozen language model.
        seed: of sampling, and of the choice of windows.
    """
    text = _prompt(prompt, prompt_file)
    _check(sampling, min(calibration.window - 1, calibration.windows))
    architecture = model.architecture()
    gates = shipped_gates(architecture) if gates == SHIPPED else gates
    bank = GateBank.from_pretrained(gates) if gates else None
    chosen = choose(policy, price, footprint, max_tokens, max_bytes, plan, chat, bank, architecture.layers)
    chosen.policy.check(architecture, bank)
    if not is_terminal():  # stdout has the answer alone, and stderr one line
        disable_progress_bar()
    lm = model.load()
    if bank is not None:
        lm.fingerprint.check(bank.fingerprint, f"the gates in {gates}")
        bank = bank.to(model.device)
        chosen = replace(chosen, gates=bank)
    first = encode(lm.tokenizer, text or "…", chat, first=True)  # an error here comes before anything takes long
    check_room(len(first), sampling.max_new_tokens, architecture.max_positions)
    texts = []
    if chosen.needs_texts:
        check_window(lm.model, calibration.window)
        counts = {"train": calibration.windows}
        windows = plan_windows(calibration.sources, counts, lm.tokenizer, calibration.window, seed=seed, say=_tell)
        chosen = chosen.solved(_calibration(lm, bank if chosen.policy.gated else None, windows.of_split("train")))
        texts = windows.sources
    torch.manual_seed(seed)
    scale = ScoreScale.of(bank)
    _tell(chosen.describe(scale, gates))
    conversation = _talk(lm, chosen, text, chat, _generation(lm, sampling))
    if conversation is None:
        return
    settings = {
        "backbone": model.backbone,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "gates": gates,
        "chat": chat,
        "policy": chosen.policy.to_dict(),
        "budget": None if chosen.budget is None else asdict(chosen.budget),
        "footprint": chosen.footprint if chosen.budget is None else chosen.budget.footprint,
        **asdict(sampling),
        "texts": texts,
        "calibration_window": calibration.window,
        "calibration_windows": calibration.windows,
        "seed": seed,
    }
    figures = _figures(conversation)
    result = write_result(Path(out), "generate", settings, figures)
    _tell(str(conversation.cache.report()))
    page = write_page(
        Path(out) / "lifespans.html",
        conversation.token_texts(),
        *conversation.cache.decisions(len(conversation.ids)),
        policy=chosen.policy,
        model=lm.name,
        budgets=conversation.budgets,
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
    chosen: Choice,
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
        conversation = Conversation(lm, chosen.gates, chosen.policy, chat, chosen.budget)
        conversation.say(text, generation)
        return conversation
    while (line := ask()) is not None:
        current = conversation
        if current is None or not chat:
            current = Conversation(lm, chosen.gates, chosen.policy, chat, chosen.budget)
        try:
            turn = current.say(line, generation)
        except SmartKVError as error:  # the conversation goes on after a line that does not fit
            print(f"error: {error}", file=sys.stderr)
            continue
        conversation = current
        _tell(conversation.status(turn.ms_per_token))
    return conversation


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
            "report": "what the cache holds at the end beside its budget, keys a KV head (see CacheReport)",
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
        "report": cache.report().to_dict(),
        "bytes_by_layer": cache.bytes_by_layer.tolist(),
        "live_keys_by_layer": cache.live_keys.double().mean(dim=(1, 2)).tolist(),
        "ms_per_token": sum(ms * n for ms, n in times) / sum(n for _, n in times) if times else None,
    }


def _tell(line: str) -> None:
    """Print a line to stderr on a terminal; elsewhere only the last line of the command is printed."""
    if is_terminal():
        print(line, file=sys.stderr)
