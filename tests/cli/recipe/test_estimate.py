"""The estimate that is printed before the work."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cli.recipe.configs import Layout
from cli.recipe.estimate import Estimate, check_disk, estimate, estimate_table, in_bytes, in_time
from cli.recipe.settings import SIZES, Options
from smartkv.errors import SmartKVError
from tests.cli.fixtures import a_look

OPTIONS = Options("m")


def by_step(options: Options = OPTIONS, **changes: object) -> dict[str, Estimate]:
    return {each.step: each for each in estimate(Layout(Path("out")), options, a_look(**changes))}


@pytest.mark.parametrize(
    ("piece", "step"),
    [("harvest", "harvest"), ("gates", "lifespans"), ("distilled", "distilled"), ("report", "report")],
)
def test_a_step_takes_as_long_as_its_pieces(piece: str, step: str) -> None:
    usual = by_step()
    slower = by_step(seconds=a_look().seconds | {piece: 3 * a_look().seconds[piece]})
    assert slower[step].seconds > 1.5 * usual[step].seconds
    assert [name for name in usual if slower[name].seconds != usual[name].seconds] == [step]


def test_a_harvest_of_so_many_windows_takes_so_long_and_leaves_so_much() -> None:
    amounts, harvest = SIZES["standard"], by_step()["harvest"]
    windows = sum(amounts.harvest)
    assert windows <= harvest.seconds <= windows + 30
    keys = 4 * 2 * windows * 2048  # layers, KV heads, tokens
    assert 1.0 < harvest.disk / (keys * (2 * 8 + 3 * 4)) < 1.1  # half precision; three lifespans of 4 bytes


def test_every_size_takes_longer_and_more_disk_than_the_one_before() -> None:
    for step in ("harvest", "lifespans", "distilled", "report"):
        made = [by_step(replace(OPTIONS, size=size))[step] for size in ("tiny", "small", "standard", "large")]
        seconds, disk = [each.seconds for each in made], [each.disk for each in made]
        assert seconds == sorted(seconds) and disk == sorted(disk)


def test_a_full_disk_is_told_before_the_work(tmp_path: Path) -> None:
    estimates = [Estimate("harvest", "", 1.0, 1e18, "")]
    with pytest.raises(SmartKVError, match=r"the steps leave 1000000000\.0 GB in .*: make room, or give another"):
        check_disk(Layout(tmp_path), estimates)
    check_disk(Layout(tmp_path), [replace(estimates[0], disk=1.0)])


def test_the_table_has_a_row_for_each_step_and_the_time_that_is_left() -> None:
    console = Console(width=160, record=True)
    estimates = [Estimate("harvest", "a", 600.0, 2e9, "x"), Estimate("report", "b", 30.0, 5e6, "y")]
    console.print(estimate_table(OPTIONS, estimates, {"harvest"}))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "│" in line
    ]
    assert rows == [
        ["harvest", "a", "done", "2.0 GB", "x"],
        ["report", "b", "30 s", "5 MB", "y"],
        ["all", "", "30 s", "2.0 GB", ""],
    ]


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (89.0, "89 s"), (600.0, "10 min"), (9000.0, "2.5 h")])
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_time(seconds) == words


@pytest.mark.parametrize(("count", "words"), [(10.0, "1 MB"), (5.4e6, "5 MB"), (2.35e9, "2.4 GB")])
def test_bytes_in_words(count: float, words: str) -> None:
    assert in_bytes(count) == words
