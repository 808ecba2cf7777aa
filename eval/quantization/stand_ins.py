"""Models for `python -m eval baselines`, and random weights of the same shape for those that cannot be had."""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from smartkv.errors import SmartKVError
from smartkv.models.architecture import Architecture
from smartkv.models.backbone import Backbone, check_device, freeze, load_backbone, read_architecture, resolve_dtype
from smartkv.models.gguf import PACKAGED


@dataclass(frozen=True)
class Shape:
    """Shape of a model's cache."""

    layers: int
    kv_heads: int
    head_dim: int

    @staticmethod
    def of(architecture: Architecture) -> "Shape":
        """Return the shape of the cache of a model with this architecture."""
        return Shape(architecture.layers, architecture.kv_heads, architecture.head_dim)


SHAPES = {  # known without reading a config
    "gpt2": Shape(12, 12, 64),
    "gpt2-medium": Shape(24, 16, 64),
    PACKAGED: Shape(30, 3, 64),
}
VOCABULARY, POSITIONS = 50_257, 1024  # of GPT-2


@dataclass(frozen=True)
class Loaded:
    """A loaded model.

    Attributes:
        lm: the model.
        stand_in: what stands in for the model that was asked for, and why. None: it is that model.
    """

    lm: Backbone
    stand_in: str | None = None


def shape_of(model: str, trust_remote_code: bool = False) -> Shape:
    """Return the shape of a model's cache; at most the model's config is read.

    Raises:
        SmartKVError: the config cannot be had.
    """
    return SHAPES[model] if model in SHAPES else Shape.of(read_architecture(model, trust_remote_code))


def load_or_stand_in(model: str, dtype: str, device: str, seed: int, trust_remote_code: bool = False) -> Loaded:
    """Load a model; a GPT-2 that cannot be had is replaced by random weights of its shape and a byte tokenizer.

    Raises:
        SmartKVError: another model that cannot be had.
    """
    check_device(device)
    computed = resolve_dtype(dtype, device)  # before the try: a wrong dtype is an error and no reason for a stand-in
    try:
        return Loaded(load_backbone(model, dtype, device, trust_remote_code))
    except SmartKVError as error:
        if not model.startswith("gpt2") or model not in SHAPES:
            raise
        reason = str(error).split("\n")[0]
    torch.manual_seed(seed)
    shape = SHAPES[model]
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_layer=shape.layers,
        n_head=shape.kv_heads,
        n_embd=shape.kv_heads * shape.head_dim,
    )
    weights = GPT2LMHeadModel(config)
    weights.to(device=torch.device(device), dtype=computed)  # type: ignore[call-arg]  # a wrapped method, to mypy
    lm = freeze(weights, _byte_tokenizer(), model)
    why = f"{model} cannot be had ({reason}): random weights of its shape stand in; their perplexity means nothing"
    return Loaded(lm, why)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!")
