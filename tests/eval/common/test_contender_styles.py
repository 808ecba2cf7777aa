"""Labels, colours and markers of contenders."""

import pytest

from eval.common.contender_styles import BLUE, STYLES, contender_label, contender_styles
from eval.contenders.baselines import BASELINES
from eval.contenders.registry import NULLS, ORACLES


@pytest.mark.parametrize("name", ["gates", "window", "full", *BASELINES, *NULLS, *ORACLES])
def test_every_built_in_contender_has_a_style_of_its_own(name: str) -> None:
    assert name in STYLES


def test_no_two_contenders_of_one_picture_look_alike() -> None:
    names = ["gates", "gates+8bit", "gates+k6v4", "window", *BASELINES, *NULLS, *ORACLES, "quant:int8", "quant:kivi4"]
    seen = {(style.colour, style.marker) for style in contender_styles(names).values()}
    assert len(seen) == len(names)


def test_a_contender_looks_the_same_whoever_stands_beside_it() -> None:
    alone, beside = contender_styles(["h2o"]), contender_styles(["mine", "window", "h2o", "theirs"])
    assert alone["h2o"] == beside["h2o"]


def test_an_unknown_contender_keeps_its_look_and_differs_from_all_others() -> None:
    names = [f"policy-{number}" for number in range(12)]
    styles = contender_styles([*names, *STYLES])
    assert len({(style.colour, style.marker) for name, style in styles.items() if name in names}) == len(names)
    assert contender_styles(["policy-3"])["policy-3"] == contender_styles(["window", "policy-3"])["policy-3"]
    known = {(style.colour, style.marker) for style in STYLES.values()}
    assert not known & {(styles[name].colour, styles[name].marker) for name in names}


@pytest.mark.parametrize(("kind", "line"), [("ours", "-"), ("null", ":"), ("oracle", "--"), ("quantised", "")])
def test_the_kind_of_an_unknown_contender_decides_its_line(kind: str, line: str) -> None:
    assert contender_styles(["mine"], {"mine": kind})["mine"].line == line


def test_quantised_contenders_are_points_and_ours_stand_out() -> None:
    styles = contender_styles(["quant:int4", "quant:kivi2@32", "gates", "h2o"])
    assert styles["quant:int4"].line == styles["quant:kivi2@32"].line == ""
    assert styles["gates"].colour == BLUE and styles["gates"].width > 1.5 * styles["h2o"].width


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("window", "StreamingLLM window"),
        ("gates 0.25", "SmartKV gates, 0.25"),
        ("random:3", "Random keys"),
        ("press:snapkv", "SnapKV"),
        ("all-gated+4bit", "SmartKV, all layers gated, 4 bits"),
        ("gates+k8v4 0.5", "SmartKV gates, keys 8 and values 4 bits, 0.5"),
        ("quant:kivi2@32", "KIVI, 2 bits, latest 32 exact"),
        ("null:my_table", "my table (null)"),
        ("my_policy", "my policy"),
        ("4,096 tokens", "4,096 tokens"),
        ("6%", "6%"),
    ],
)
def test_names_are_written_as_a_person_would(name: str, label: str) -> None:
    assert contender_label(name) == label
