"""A fit that dies at given moments, whichever they are, goes on to the weights of one that did not."""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.gates import LifespanGates
from tests.lightning_fixtures import gates_config, run_cli, write_config
from tests.survival.killing import exit_status

HOOKS = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_save_checkpoint",
    "on_validation_start",
    "on_validation_epoch_end",
    "on_train_epoch_end",
)
EPOCHS, DIED = 3, 9


def fit(root: Path, shards: Path, dies: tuple[str, int] | None = None) -> None:
    """Start, or go on, in a process of its own; `dies`: at which call of which hook it ends, with nothing put away."""

    def run() -> None:
        if dies:
            hook, number = dies
            inner, calls = getattr(LifespanGates, hook), iter(range(10**6))

            def last(self: LifespanGates, *args: Any, **kwargs: Any) -> Any:
                if next(calls) == number:
                    os._exit(DIED)
                return inner(self, *args, **kwargs)

            setattr(LifespanGates, hook, last)
        saving = {"dirpath": str(root / "checkpoints"), "every_n_train_steps": 1, "save_last": True, "save_top_k": 1}
        checkpoints = {"class_path": "ModelCheckpoint", "init_args": saving | {"enable_version_counter": False}}
        config = gates_config(shards, root, trainer={"max_epochs": EPOCHS}, callbacks=[checkpoints])
        run_cli("fit", "-c", write_config(root / "run.yaml", config), "--ckpt_path", "last")

    assert exit_status(run) in ((DIED, 0) if dies else (0,))  # 0: there are no so many calls


def last(root: Path) -> dict[str, Any]:
    return torch.load(root / "checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    root = tmp_path_factory.mktemp("whole")
    fit(root, tiny_shards)
    return root


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("early", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["early", "late"])
def test_a_fit_that_dies_goes_on_to_the_same_weights(
    early: bool, hook: str, whole: Path, tmp_path: Path, tiny_shards: Path
) -> None:
    """Early: at the first and the last call of the first epoch, and at the first of the next. Late: at later ones."""
    want = last(whole)
    steps = want["global_step"] // EPOCHS
    if "batch" in hook or "save" in hook:
        calls = (0, steps - 1, steps) if early else (steps + 1, 2 * steps - 1, 2 * steps)
    else:
        calls = (0, 1) if early else (2,)
    for number in calls:
        goes_on_to(want, tmp_path / str(number), tiny_shards, [(hook, number)])


def goes_on_to(want: dict[str, Any], root: Path, shards: Path, deaths: Sequence[tuple[str, int]]) -> None:
    for death in deaths:
        fit(root, shards, death)
    fit(root, shards)
    found = last(root)
    assert found["global_step"] == want["global_step"], deaths
    for name, tensor in want["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], tensor, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "deaths",
    [
        [("on_validation_start", 0), ("on_train_batch_end", 1), ("on_train_batch_end", 0)],
        [("on_validation_start", 0), ("on_train_batch_end", 9)],  # twice at the end of an epoch
        [("on_validation_epoch_end", 0), ("on_validation_epoch_end", 0)],
        [("on_train_epoch_end", 1), ("on_save_checkpoint", 4)],
        [("on_train_batch_end", 4), ("on_validation_start", 0), ("on_train_batch_start", 3)],
    ],
)
def test_a_fit_that_dies_again_and_again_goes_on_to_the_same_weights(
    deaths: list[tuple[str, int]], whole: Path, tmp_path: Path, tiny_shards: Path
) -> None:
    goes_on_to(last(whole), tmp_path, tiny_shards, deaths)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(20))
def test_a_fit_that_dies_at_random_moments(seed: int, whole: Path, tmp_path: Path, tiny_shards: Path) -> None:
    drawn = random.Random(seed)
    hooks = [drawn.choice(HOOKS) for _ in range(3)]
    deaths = [(hook, drawn.randrange(14 if "batch" in hook or "save" in hook else 2)) for hook in hooks]
    goes_on_to(last(whole), tmp_path, tiny_shards, deaths)
