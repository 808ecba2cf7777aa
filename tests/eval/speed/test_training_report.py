"""Tables and picture of `python -m eval training`."""

from eval.speed.training_report import table_of_heads, table_of_ways, training_picture

WAY = {"batch": 32, "together": 1.0, "apart": 2.0}
FULL_WAY = WAY | {
    "rows_a_step": 28,
    "ratio": 2.0,
    "rows_trained": 1e3,
    "rows_from_shards": 2e3,
    "rows_from_torch_load": 5,
}
HEADS = {
    "model": "m",
    "heads": 48,
    "rows_a_step": 28,
    "steps_per_second": 2.5,
    "peak_memory": 2**30,
    "shard_bytes": 2**29,
}


def test_a_picture_is_drawn_of_what_could_be_measured() -> None:
    left, middle, right = training_picture([WAY, {"batch": 64, "note": "out of memory"}], [HEADS]).axes
    assert [bar.get_height() for bar in left.patches] == [1.0, 2.0]
    assert [bar.get_width() for bar in middle.patches] == [120.0] and [bar.get_width() for bar in right.patches] == [
        1.0
    ]


def test_a_picture_of_nothing_has_no_bars() -> None:
    figure = training_picture([], [{"model": "m", "heads": 48, "note": "killed"}])
    assert not any(axes.patches for axes in figure.axes)


def test_the_tables_say_why_a_figure_is_missing() -> None:
    ways = table_of_ways([FULL_WAY, {"batch": 64, "note": "out of memory"}])
    assert list(ways.columns[1].cells) == ["28", "out of memory"] and list(ways.columns[4].cells) == ["2.00", ""]
    heads = table_of_heads([HEADS, {"model": "n", "heads": 96, "note": "killed"}], 32)
    assert list(heads.columns[2].cells) == ["28", "killed"] and list(heads.columns[4].cells) == ["120", ""]
