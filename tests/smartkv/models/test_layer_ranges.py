"""Ranges of layers, written and read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartkv.errors import SmartKVError
from smartkv.models.layer_ranges import check_ranges, format_layers, parse_layers

quick = settings(deadline=None, max_examples=30, derandomize=True)


@quick
@given(st.sets(st.integers(0, 40), min_size=1))
def test_parsing_undoes_formatting(layers: set[int]) -> None:
    assert parse_layers(format_layers(sorted(layers)), 41) == sorted(layers)


def test_ranges_are_written_as_short_as_can_be_and_read_in_any_order() -> None:
    assert format_layers([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert parse_layers(" 7 - 8, 5,0-2,1", 9) == [0, 1, 2, 5, 7, 8]


@pytest.mark.parametrize("text", [None, "all"])
def test_no_ranges_mean_all_layers(text: str | None) -> None:
    assert parse_layers(text, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize(("total", "early", "late"), [(24, "0-2", "20-23"), (28, "0-2", "20-27"), (56, "0-5", "40-55")])
def test_ranges_by_depth_scale_with_the_model_and_mix_with_numbers(total: int, early: str, late: str) -> None:
    assert format_layers(parse_layers("early", total)) == early and format_layers(parse_layers("late", total)) == late
    assert parse_layers("early, middle,late", total) == list(range(total))
    assert parse_layers("late, 3", total) == [3, *parse_layers("late", total)]


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "0..2", "1,,2", "0-2-3"])
def test_what_is_no_range_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SmartKVError, match=rf"'{text}' is no list of ranges.*'0-2,"):
        parse_layers(text, 30)


@pytest.mark.parametrize(("text", "part"), [("4", "4"), ("0-1,2-4", "2-4"), ("0-99", "0-99")])
def test_layers_that_the_model_lacks_are_refused_with_those_it_has(text: str, part: str) -> None:
    with pytest.raises(SmartKVError, match=rf"asks for {part}, but the model has layers 0-3"):
        parse_layers(text, 4)


def test_ends_the_wrong_way_round_are_refused_with_the_right_one() -> None:
    with pytest.raises(SmartKVError, match="'3-1' has its ends the wrong way round: write '1-3'"):
        parse_layers("3-1", 4)


@pytest.mark.parametrize("layers", [None, True, 1.5, [0, 1], "", "a", "-1", "0-", "all,0", "0;1"])
def test_what_is_no_range_of_any_model_is_refused_before_a_model_is_there(layers: object) -> None:
    with pytest.raises(SmartKVError, match=r"^layers .* write for example '0-2,20-23', 'early,late' or 'all'$"):
        check_ranges(layers)
