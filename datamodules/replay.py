"""Order in which blocks of keys are drawn from a buffer that windows pass through.

Nothing is read here: the order depends on numbers alone, so that every process and every resumed run works out the same
one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import RowBlock


@dataclass
class Step:
    """Reads and draws of one optimiser step.

    Attributes:
        read: indices of the windows to read before the step.
        draw: blocks of the step's batch; a block may occur twice.
        done: blocks drawn for the last time, to be freed after the step.
    """

    read: list[int] = field(default_factory=list)
    draw: list[RowBlock] = field(default_factory=list)
    done: list[RowBlock] = field(default_factory=list)


class Replay:
    """Random draw of blocks from a buffer of windows, as an iterable of `Step`s.

    Each block is drawn `passes` times and then freed. As soon as the buffer has room for a window, the next one is
    read.

    Args:
        windows: blocks of each window, in reading order.
        buffer: windows that the buffer holds. Blocks drawn for the last time by the current step come on top.
        passes: number of times each block is drawn.
        blocks_per_step: blocks per batch.
        seed: seed of the draw.

    Raises:
        SmartKVError: a number is below 1, or a window has no blocks.

    Attributes:
        live: blocks in the buffer now, each with the number of draws left.
    """

    def __init__(
        self, windows: Sequence[Sequence[RowBlock]], buffer: int, passes: int, blocks_per_step: int, seed: Sequence[int]
    ) -> None:
        if min(buffer, passes, blocks_per_step) < 1:
            raise SmartKVError(
                f"buffer, passes and blocks a step must be at least 1, got {buffer}, {passes}, {blocks_per_step}"
            )
        if not windows or not all(windows):
            raise SmartKVError("there are no windows to draw from, or one without keys to train on")
        self.windows, self.passes, self.blocks_per_step, self.seed = windows, passes, blocks_per_step, seed
        self.room = buffer * max(len(blocks) for blocks in windows)
        self.live: list[tuple[RowBlock, int]] = []

    def __len__(self) -> int:
        """Return the number of steps."""
        return -(-sum(map(len, self.windows)) * self.passes // self.blocks_per_step)

    def __iter__(self) -> Iterator[Step]:
        random, following = np.random.default_rng(list(self.seed)), 0
        self.live = []
        for _ in range(len(self)):
            step = Step()
            while len(step.draw) < self.blocks_per_step:
                while following < len(self.windows) and len(self.live) + len(self.windows[following]) <= self.room:
                    self.live += [(block, self.passes) for block in self.windows[following]]
                    step.read.append(following)
                    following += 1
                if not self.live:
                    break
                place = int(random.integers(len(self.live)))
                block, left = self.live[place]
                step.draw.append(block)
                if left > 1:
                    self.live[place] = (block, left - 1)
                else:
                    step.done.append(block)
                    self.live[place] = self.live[-1]
                    self.live.pop()
            yield step
