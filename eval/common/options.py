"""Groups of options that several commands take; their docstrings are the commands' `--help`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from eval.common.adapters import with_adapter
from smartkv.errors import SmartKVError
from smartkv.models.architecture import Architecture
from smartkv.models.backbone import Backbone, load_backbone, read_architecture
from smartkv.models.gguf import PACKAGED
from smartkv.texts.sources import SourceConfig

Split = Literal["train", "validation", "test"]
Kind = Literal["books", "code", "chat"]
Forms = Literal["own", "foreign"]


def code() -> list[SourceConfig]:
    """Return the code around facts in code."""
    return [SourceConfig("code")]


def chats() -> list[SourceConfig]:
    """Return the conversations around facts in chats."""
    return [SourceConfig("chat", origins=["local", "hub", "drawn"])]


def only_books() -> list[Kind]:
    """Return the kinds of text in which facts are asked for by default."""
    return ["books"]


def books() -> list[SourceConfig]:
    """Return the texts that most commands read by default: the books of pg19."""
    return [SourceConfig("pg19")]


@dataclass(frozen=True)
class Model:
    """The frozen language model.

    Attributes:
        backbone: hub id, local folder, .gguf file or smollm2-135m.
        dtype: auto, float32, bfloat16 or float16.
        device: cpu or cuda.
        trust_remote_code: run code that comes with the model.
    """

    backbone: str = PACKAGED
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False

    def load(self) -> Backbone:
        """Load and freeze the model.

        Raises:
            SmartKVError: the model cannot be found, or its family is not supported.
        """
        return load_backbone(self.backbone, self.dtype, self.device, self.trust_remote_code)

    def architecture(self) -> Architecture:
        """Read the model's architecture from its config, without its weights.

        Raises:
            SmartKVError: as `load`.
        """
        return read_architecture(self.backbone, self.trust_remote_code)


@dataclass(frozen=True)
class AdaptedModel(Model):
    """The frozen language model, with a peft adapter if one is given.

    Attributes:
        backbone: hub id, local folder, .gguf file or smollm2-135m.
        dtype: auto, float32, bfloat16 or float16.
        device: cpu or cuda.
        trust_remote_code: run code that comes with the model.
        adapter: folder or hub id of a peft adapter that the model gets, such as runs/eit/smollm2/final. Null: none.
    """

    adapter: str | None = None

    def load(self) -> Backbone:
        """Load and freeze the model, and put the adapter into it.

        Raises:
            SmartKVError: the model or the adapter cannot be found, or they do not fit together.
        """
        return with_adapter(super().load(), self.adapter)


@dataclass(frozen=True)
class Texts:
    """Windows of text that a command reads.

    Attributes:
        sources: the mix of texts, as in configs/harvest; a folder of your own is {name: mine, path: FOLDER}.
        split: train, validation or test.
        windows: number of windows.
    """

    sources: list[SourceConfig] = field(default_factory=books)
    split: Split = "test"
    windows: int = 16


@dataclass(frozen=True, kw_only=True)
class NamedTexts(Texts):
    """Windows of one kind of text.

    Attributes:
        name: what results call this kind of text.
        sources: the mix of texts, as in configs/harvest; a folder of your own is {name: mine, path: FOLDER}.
        split: train, validation or test.
        windows: number of windows.
    """

    name: str
    windows: int = 48


def check_names(texts: Sequence[NamedTexts]) -> None:
    """Raise SmartKVError if two kinds of text have one name: results tell them apart by it."""
    names = [text.name for text in texts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SmartKVError(f"two texts are named '{twice[0]}': give each a name of its own")


@dataclass(frozen=True)
class CalibrationTexts:
    """Texts, train split, on which prices are solved, and nulls learn.

    Attributes:
        sources: the mix of texts, as in configs/harvest.
        windows: number of windows.
    """

    sources: list[SourceConfig] = field(default_factory=books)
    windows: int = 4


@dataclass(frozen=True)
class CalibrationWindows(CalibrationTexts):
    """Texts, train split, on which windows and prices are solved, cut into windows of a given length.

    Attributes:
        sources: the mix of texts, as in configs/harvest.
        windows: number of windows.
        window: tokens of a window.
    """

    window: int = 1024


@dataclass(frozen=True)
class Measure:
    """Which tokens are read, and which of them count.

    Attributes:
        window: tokens of a window.
        score_from: tokens of a window are scored from this one on.
        windows_per_document: most windows from one document, unless the texts run out.
        seed: of the choice of windows and of all else that is drawn.
    """

    window: int = 2048
    score_from: int = 512
    windows_per_document: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated.

    Attributes:
        max_new_tokens: most tokens of an answer; 0: the prompt is read, and nothing is answered.
        temperature: of sampling; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that hold this share of the probability.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Recall:
    """Facts that are stated once in a text and asked for at its end.

    Attributes:
        trials: number of facts in each kind of text; 0: none.
        tokens: tokens of text around a fact.
        split: train, validation or test, of the text and of the ways in which facts are stated.
        kinds: kinds of text: books, code and chat (the user gives a value in an early turn and asks for it at the end).
        forms: own: the ways in which facts are stated are those of the split, in books the first two of them. foreign:
            those of the test split (smartkv/texts/recall_test.yaml), whose author has not seen those of training.
        haystack: the text around the facts in books.
        code_haystack: the code around the facts in code.
        chat_haystack: the conversations around the facts in chats.
    """

    trials: int = 64
    tokens: int = 1900
    split: Split = "test"
    kinds: list[Kind] = field(default_factory=only_books)
    forms: Forms = "own"
    haystack: list[SourceConfig] = field(default_factory=books)
    code_haystack: list[SourceConfig] = field(default_factory=code)
    chat_haystack: list[SourceConfig] = field(default_factory=chats)

    def haystack_of(self, kind: Kind) -> list[SourceConfig]:
        """Return the text around the facts of a kind."""
        return {"books": self.haystack, "code": self.code_haystack, "chat": self.chat_haystack}[kind]
