"""What the user chooses, and how many windows and steps each size has."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from smartkv.errors import SmartKVError
from smartkv.texts.sources import SourceConfig

Size = Literal["tiny", "small", "standard", "large"]
Device = Literal["auto", "cpu", "cuda"]
Split = tuple[int, int]  # windows of train and of validation
ROOM_FOR_FACTS = 512  # tokens of a window, from which on facts are stated and asked for
SHORTEST = 128  # tokens; a shorter window has no room for what always stays
BIG_VOCABULARY = 100_000  # from here on the logits cost more than the layers


@dataclass(frozen=True)
class Options:
    """What decides the result. A folder holds the result of one set of options.

    Attributes:
        backbone: hub id, local folder, .gguf file or name.
        size: see `SIZES`.
        sources: mix of texts; None: `cli.recipe.mix.MIX`, as far as it can be had.
        dtype: of the model.
        device: where it computes.
        seed: of the choice of windows.
        trust_remote_code: run code that comes with the model.
    """

    backbone: str
    size: Size = "standard"
    sources: list[SourceConfig] | None = None
    dtype: str = "auto"
    device: Device = "auto"
    seed: int = 0
    trust_remote_code: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON holds them."""
        return asdict(self)


@dataclass(frozen=True)
class Amounts:
    """Windows and steps of one size.

    Attributes:
        harvest: windows whose keys are labelled, train and validation.
        epochs: most passes over their keys.
        distilled: windows of the distillation, train (one a step) and validation.
        report: test windows of each kind of text.
        facts: facts that are asked for in each of books, code and chats.
        calibration: windows on which prices are solved.
        window: tokens of a window of harvest and report.
        short_window: tokens of a window of the distillation.
    """

    harvest: Split
    epochs: int
    distilled: Split
    report: int
    facts: int
    calibration: int
    window: int = 2048
    short_window: int = 1024

    @property
    def follow_up(self) -> int:
        """Tokens for which a key is followed up."""
        return self.window // 2

    def within(self, positions: int) -> "Amounts":
        """Return the same amounts with windows that a model of so many positions takes.

        Raises:
            SmartKVError: the model has too few positions.
        """
        if positions < SHORTEST:
            raise SmartKVError(f"the model has {positions} positions: gates need windows of at least {SHORTEST} tokens")
        window, short = min(self.window, positions), min(self.short_window, positions)
        return replace(self, window=window, short_window=short, facts=self.facts if window >= ROOM_FOR_FACTS else 0)


SIZES: dict[Size, Amounts] = {
    # the whole road in a minute or two, to see that it can be gone here; gates of no use
    "tiny": Amounts((6, 2), 2, (6, 2), 2, 2, 2, window=512, short_window=512),
    # a first result
    "small": Amounts((24, 6), 8, (100, 4), 4, 8, 6),
    # as much as the gates that come with SmartKV saw
    "standard": Amounts((48, 12), 10, (600, 8), 8, 16, 8),
    # for a GPU or a night
    "large": Amounts((128, 24), 12, (2000, 16), 16, 32, 16),
}
