"""`python -m eval baselines`: bytes, errors, speed and perplexity of quantised caches, measured and judged."""

import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from eval.common.console import make_console
from eval.common.options import Model
from eval.common.results import machine, write_result
from eval.contenders.quantised import QuantisedContender
from eval.quantization.judgements import judge
from eval.quantization.probe import CodecComparison, Probe, synthetic_layer
from eval.quantization.stand_ins import Loaded, Shape, load_or_stand_in, shape_of
from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.quantized_cache import QuantizedCache, QuantizedLayer
from smartkv.cache.ragged import storage_bytes
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.labels.lifespans import check_window
from smartkv.metrics.perplexity import window_nll
from smartkv.quantization.codecs import SCHEMES, Adaptive, Codec
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import plan_windows

BASELINES = {"FP16": "fp16", "INT8": "int8", "INT4": "int4", "KIVI": "kivi", "SmartKV": "adaptive"}
MORE = {"KIVI2": "kivi2", "KIVI4": "kivi4"}
REPEATS = 5
STEPS = 16  # single tokens that are timed


def baselines(
    model: Model = Model("gpt2", dtype="float32"),  # noqa: B008
    baselines: list[str] = list(BASELINES),  # noqa: B006 - jsonargparse shows it; never changed
    num_prompts: int = 4,
    memory_only: bool = False,
    out: str = "experiments/validation",
    experiment_id: str | None = None,
    tokens: int = 1024,
    residual: int | None = None,
    budget: float = 0.5,
    gates: str | None = None,
    sources: list[SourceConfig] = [SourceConfig("pg19", origins=["local", "hub", "builtin"])],  # noqa: B006, B008
    seed: int = 0,
) -> None:
    """Measure memory, error, speed and perplexity of quantised caches, and judge ratios and the order of errors.

    The exit status is 1 where something is not as expected.

    Args:
        model: the frozen language model; errors are those against its exact attention. gpt2 and gpt2-medium are
            replaced by random weights of the same shape where they cannot be had; their perplexity then means nothing,
            and is left out.
        baselines: FP16, INT8, INT4, KIVI (keys in 2 bits, values in 4), KIVI2, KIVI4, SmartKV (bits by importance).
        num_prompts: texts.
        memory_only: no model is loaded: bytes, errors and times are those of random keys of the model's shape, with
            outlier channels where errors are measured.
        out: folder for <experiment_id>.json and validation.log.
        experiment_id: name of the result. Null: date and time.
        tokens: of a text.
        residual: latest tokens that stay exact. Null: each scheme's own (KIVI 128, SmartKV 64, others 0).
        budget: of SmartKV, bytes of what is encoded ÷ those in float16, all included: about 0.3 to 0.6.
        gates: tell SmartKV what is important. Null: attention so far does.
        sources: the texts, validation split.
        seed: of texts and random weights.
    """
    console = make_console()
    known = BASELINES | MORE
    unknown = [name for name in baselines if name not in known]
    if unknown or not baselines:
        raise SmartKVError(f"there are no baselines {unknown}: expected some of {', '.join(known)}")
    if num_prompts < 1 or tokens < 64:
        raise SmartKVError(f"num_prompts must be at least 1 and tokens at least 64, got {num_prompts} and {tokens}")
    folder, name = Path(out), experiment_id or datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    log = _log(folder)
    log.info("experiment %s: %s on %s%s", name, model.backbone, model.device, ", memory only" if memory_only else "")
    codecs = {each: SCHEMES[known[each]] for each in baselines}
    if "SmartKV" in codecs:
        adaptive, usual = codecs["SmartKV"]
        codecs["SmartKV"] = replace(cast(Adaptive, adaptive), budget=budget), usual
    codecs = {each: (codec, _residual(codec, usual, residual)) for each, (codec, usual) in codecs.items()}
    figures: dict[str, dict[str, Any]] = {each: {} for each in baselines}
    loaded: Loaded | None = None
    used: list[Any] = []
    if memory_only:
        shape = shape_of(model.backbone, model.trust_remote_code)
    else:
        loaded = load_or_stand_in(model.backbone, model.dtype, model.device, seed, model.trust_remote_code)
        check_window(loaded.lm.model, tokens)
        shape = Shape.of(loaded.lm.architecture)
        if loaded.stand_in:
            console.print(f"[yellow]{loaded.stand_in}[/]")
            log.warning(loaded.stand_in)
    for each, (codec, kept) in codecs.items():
        figures[each] |= _memory(codec, kept, shape, tokens, seed)
    if loaded is None:
        _synthetic(codecs, figures, shape, tokens, seed)
    else:
        used = _measure(console, loaded, codecs, figures, gates, sources, num_prompts, tokens, seed)
    table = _table(figures, model.backbone, tokens, loaded)
    console.print(table)
    plain = Console(width=140, file=StringIO())
    plain.print(table)
    judgements = judge(figures, budget, tokens)
    for judgement in judgements:
        console.print(judgement.line(), highlight=False)
        plain.print(judgement.line(), highlight=False)
    log.info("\n%s", plain.file.getvalue())  # type: ignore[attr-defined]
    settings = {"model": model.backbone, "device": model.device, "tokens": tokens, "num_prompts": num_prompts}
    settings |= {"seed": seed, "memory_only": memory_only, "dtype": model.dtype, "shape": vars(shape), "gates": gates}
    settings |= {"budget": budget, "residual": {each: kept for each, (_, kept) in codecs.items()}}
    extra = {"stand_in": loaded.stand_in if loaded else None, "sources": used, "machine": machine(model.device)}
    extra["judgements"] = [vars(judgement) for judgement in judgements]
    result = write_result(folder, name, settings, {"units": UNITS} | extra | {"baselines": figures})
    log.info("written: %s", result)
    console.print(f"  {result}\n  {folder / 'validation.log'}", highlight=False)
    judged = [judgement.fine for judgement in judgements if judgement.fine is not None]
    if not all(judged):
        print(f"{judged.count(False)} of {len(judged)} expectations do not hold", file=sys.stderr)
        sys.exit(1)


UNITS = {
    "ratio_payload": "bits of the codes ÷ those of float16",
    "ratio_stored": "bytes held, scales, zeros and residual included, ÷ those of the same tokens in float16",
    "ratio_encoded": "the same of the tokens that are encoded alone; null: none is",
    "exact_tokens": "of these, tokens that are not encoded yet: the residual, and a block that is filling up",
    "error_key, error_value, error_output": "‖found − exact‖ ÷ ‖exact‖ (Frobenius), mean over layers and texts, all "
    "encoded; SmartKV's bits by the attention that keys have got when they are encoded, or by gates",
    "encode_ms, decode_ms": "of all layers' keys and values of the text, median; memory_only: one layer's × layers",
    "step_ms": "a forward pass of one token after the text, median",
    "perplexity": "of the texts' last three quarters, read as decoding would; the exact cache's beside it",
}


def _residual(codec: Codec, usual: int, asked: int | None) -> int:
    kept = usual if asked is None else asked
    return kept if codec.block == 1 or kept else codec.block


def _log(folder: Path) -> logging.Logger:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / "validation.log", encoding="utf-8")
    except OSError as error:
        raise SmartKVError(f"{folder} cannot be written to ({error.strerror}): give another --out") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("smartkv.validation")
    for old in log.handlers[:]:
        log.removeHandler(old)
        old.close()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    return log


def _memory(codec: Codec, residual: int, shape: Shape, tokens: int, seed: int) -> dict[str, Any]:
    """Return ratios and bytes of a cache of random keys, float16 where they are exact.

    One layer is filled, since all layers are alike.
    """
    random = torch.Generator().manual_seed(seed)
    layer = QuantizedLayer(codec, residual)
    key, value = (torch.randn(1, shape.kv_heads, tokens, shape.head_dim, generator=random).half() for _ in range(2))
    for start in range(0, tokens, max(codec.block, 32)):
        part = slice(start, start + max(codec.block, 32))
        if isinstance(codec, Adaptive):  # its layer keeps the importance of the tokens that are still exact
            new = torch.zeros(1, shape.kv_heads, key[:, :, part].shape[2])
            layer.importance = new if layer.importance is None else torch.cat([layer.importance, new], dim=2)
        layer.update(key[:, :, part], value[:, :, part])
    full = 2 * key.numel() * 2
    exact = layer.keys.shape[2]
    encoded = full * (1 - exact / tokens)
    return {
        "ratio_payload": codec.payload(shape.head_dim),
        "ratio_stored": layer.storage_bytes / full,
        "ratio_encoded": storage_bytes(list(layer.parts.values())) / encoded if encoded else None,
        "exact_tokens": exact,
        "bytes": layer.storage_bytes * shape.layers,
        "bytes_float16": full * shape.layers,
    }


def _synthetic(
    codecs: dict[str, tuple[Codec, int]], figures: dict[str, dict[str, Any]], shape: Shape, tokens: int, seed: int
) -> None:
    """Add errors and times of a layer of random keys to `figures`; all layers are alike."""
    comparison = _comparison(codecs)
    length = tokens // comparison.block * comparison.block
    with torch.inference_mode():
        comparison.read(synthetic_layer(shape, length, seed))
        for name, errors in comparison.errors().items():
            figures[name] |= errors
        for name, times in comparison.times(REPEATS).items():
            figures[name] |= {key: shape.layers * value for key, value in times.items()}


def _measure(
    console: Console,
    loaded: Loaded,
    codecs: dict[str, tuple[Codec, int]],
    figures: dict[str, dict[str, Any]],
    gates: str | None,
    sources: list[SourceConfig],
    num_prompts: int,
    tokens: int,
    seed: int,
) -> list[Any]:
    """Add errors, times and perplexity to `figures`.

    Returns:
        Where the texts came from.
    """
    lm = loaded.lm
    bank = GateBank.from_pretrained(gates, lm.model).to(lm.model.device) if gates else None
    plan = plan_windows(sources, {"validation": num_prompts}, lm.tokenizer, tokens, 4, seed, console.print)
    texts = [text.long() for text in plan.of_split("validation")]
    first_token = tokens // 4
    with Progress(console=console) as progress, torch.inference_mode():
        task = progress.add_task("Errors", total=1 + len(texts) + len(codecs) * (len(texts) + 1))
        errors: list[dict[str, dict[str, float]]] = []
        for text in texts:
            with Probe(lm.model, _comparison(codecs), bank) as probe:
                length = tokens // probe.comparison.block * probe.comparison.block
                lm.model.base_model(input_ids=text[None, :length].to(lm.model.device), past_key_values=probe)
            errors.append(probe.comparison.errors())
            progress.advance(task)
        for name in codecs:
            figures[name] |= {key: statistics.mean(each[name][key] for each in errors) for key in errors[0][name]}
        for name, times in probe.comparison.times(REPEATS).items():
            figures[name] |= times
        exact = [window_nll(lm.model, text, first_token) for text in texts]
        progress.advance(task)
        for name, (codec, residual) in codecs.items():
            progress.update(task, description=name)
            made = _maker(loaded, codec, residual, bank)
            figures[name]["step_ms"] = _step(loaded, made, texts[0])
            progress.advance(task)
            if loaded.stand_in:
                progress.advance(task, len(texts))
                continue
            contender, nll = QuantisedContender(lm, name, made, at_once=min(32, max(codec.block, 8))), []
            for text in texts:
                nll.append(float(contender.read(1.0, text, first_token, first_token, None).nll.double().mean()))
                progress.advance(task)
            mean = torch.tensor([nll, exact], dtype=torch.float64).mean(dim=1).exp().tolist()
            figures[name]["perplexity"], figures[name]["perplexity_exact"] = mean
    return plan.sources


def _comparison(codecs: dict[str, tuple[Codec, int]]) -> CodecComparison:
    kept = max((residual for codec, residual in codecs.values() if isinstance(codec, Adaptive)), default=0)
    return CodecComparison({name: codec for name, (codec, _) in codecs.items()}, kept)


def _maker(loaded: Loaded, codec: Codec, residual: int, bank: GateBank | None) -> Callable[[], QuantizedCache]:
    model = loaded.lm.model
    if isinstance(codec, Adaptive):
        return lambda: AdaptiveCache(model, bank, codec, residual)
    return lambda: QuantizedCache(model, codec, residual)


def _step(loaded: Loaded, make: Callable[[], QuantizedCache], text: torch.Tensor) -> float:
    """Return the milliseconds of one token after the text, median."""
    model = loaded.lm.model
    ids, times = text[None].to(model.device), []
    contender = QuantisedContender(loaded.lm, "", make)
    with contender.open(1.0, 0) as cache:
        model.base_model(input_ids=ids[:, :-STEPS], past_key_values=cache)
        for place in range(ids.shape[1] - STEPS, ids.shape[1]):
            start = time.perf_counter()
            model.base_model(input_ids=ids[:, place, None], past_key_values=cache)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


COLUMNS = {
    "ratio_payload": ("payload", 4),
    "ratio_stored": ("stored", 4),
    "error_key": ("key error", 4),
    "error_value": ("value error", 4),
    "error_output": ("output error", 4),
    "encode_ms": ("encode ms", 1),
    "decode_ms": ("decode ms", 1),
    "step_ms": ("step ms", 1),
    "perplexity": ("perplexity", 3),
}


def _table(figures: dict[str, dict[str, Any]], model: str, tokens: int, loaded: Loaded | None) -> Table:
    table = Table(title=f"{model}, {tokens:,} tokens; ratios of float16's bytes")
    table.add_column("", style="bold cyan")
    shown = [key for key in COLUMNS if any(key in row for row in figures.values())]
    for key in shown:
        table.add_column(COLUMNS[key][0], justify="right")
    for name, row in figures.items():
        table.add_row(name, *(f"{row[key]:.{COLUMNS[key][1]}f}" if key in row else "" for key in shown))
    exact = next((row["perplexity_exact"] for row in figures.values() if "perplexity_exact" in row), None)
    if exact is not None:
        table.caption = f"perplexity of the exact cache: {exact:.3f}"
    elif loaded is not None:
        table.caption = "random weights: no perplexity"
    return table
