"""In which order keys are drawn from a buffer that new windows flow through.

Only numbers: nothing is read here, so that any process, and any later run, can work out the same order again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from smartkv.errors import SmartKVError
from smartkv.shards.manifest import RowBlock


@dataclass
class Step:
    """What one optimiser step takes.

    Attributes:
        read: windows to be read for it, by their numbers.
        draw: blocks of its batch.
        done: blocks that are not drawn again.
    """

    read: list[int] = field(default_factory=list)
    draw: list[RowBlock] = field(default_factory=list)
    done: list[RowBlock] = field(default_factory=list)


class Replay:
    """Draws blocks at random among those held; each is drawn `passes` times and then let go, and as soon as there is
    room for a window the next one is read.

    Args:
        windows: the blocks of each window, in the order in which windows are read.
        buffer: windows whose blocks are held at once; beside them, those that the batch at work has drawn for the last
            time.
        passes: how often each block is drawn.
        blocks_per_step: of a batch.
        seed: of the draw.

    Raises:
        SmartKVError: a figure below 1, or no blocks.

    Attributes:
        live: blocks that are held now, with how often each will still be drawn.
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
        """Steps."""
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
