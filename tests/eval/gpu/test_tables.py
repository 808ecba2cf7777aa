"""The page of a GPU check."""

from eval.gpu.tables import TITLES, page, table


def test_a_table_has_a_column_for_each_figure_that_some_row_has() -> None:
    rows = [
        {"shape": "S", "context": 8192, "batch": 1, "way": "a", "microseconds": 1234.5},
        {"shape": "S", "context": 8192, "batch": 1, "way": "b", "note": "no | kernel"},
    ]
    assert table(rows) == [
        "| shape | context | batch | way | µs |  |",
        "|---|---|---|---|---:|---:|",
        "| S | 8,192 | 1 | a | 1,234 |  |",
        "| S | 8,192 | 1 | b |  | no / kernel |",
    ]


def test_bytes_are_gigabytes() -> None:
    assert table([{"way": "a", "bytes": 2_500_000_000}])[-1] == "| a | 2.500 |"


def test_a_page_has_the_parts_that_have_rows() -> None:
    text = page({"device": "D"}, {"tiny": True}, {"fit": [{"way": "a", "ratio": 2.0}], "tests": []})
    assert TITLES["fit"] in text and TITLES["tests"] not in text and "device D" in text and "tiny True" in text
