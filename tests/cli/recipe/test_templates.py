"""Values that are put into a template."""

import pytest
import yaml

from cli.recipe.templates import fill
from smartkv.errors import SmartKVError

TEMPLATE = """\
# An old header.

out: runs/x                   # folder
trainer:
  callbacks:
    - class_path: ModelCheckpoint
      init_args:
        mode: min             # smaller is better
    - class_path: GateExport
      init_args:
        mode: max             # larger is better
data:
  windows: {train: 1}         # counts
  # the mix
  sources:
    - {name: a}
    - {name: b}

last: [1, 2]                  # a list
"""


def test_a_value_is_replaced_and_its_comment_stays_at_its_place() -> None:
    text = fill(TEMPLATE, {"out": "runs/another", "data.windows": {"train": 6, "test": 0}}, "new")
    assert "out: runs/another             # folder" in text
    assert "  windows: {train: 6, test: 0}  # counts" in text  # no room: two spaces


def test_a_callback_is_named_by_its_class() -> None:
    read = yaml.safe_load(fill(TEMPLATE, {"trainer.callbacks.GateExport.init_args.mode": "min"}, "new"))
    assert [each["init_args"]["mode"] for each in read["trainer"]["callbacks"]] == ["min", "min"]


def test_a_list_of_lines_is_replaced_by_as_many_as_there_are() -> None:
    sources = [{"name": "x", "weight": 0.1, "origins": ["local"]}]
    text = fill(TEMPLATE, {"data.sources": sources}, "new")
    assert "  # the mix\n  sources:\n    - {name: x, weight: 0.1, origins: [local]}\n\nlast:" in text


def test_a_list_that_is_too_long_for_a_line_takes_several() -> None:
    value = [{"name": f"text number {number}"} for number in range(8)]
    text = fill(TEMPLATE, {"last": value}, "new")
    assert yaml.safe_load(text)["last"] == value and "\n  - {name: text number 0}\n" in text
    assert "last:                  # a list\n" in text


@pytest.mark.parametrize(
    "value", ["", "null", "true", "1", "a: b", "a, b", "#x", "C:\\x", "a 'b' \"c\"", "é/ü", " x", "-", "~", "1e-3", 2.5]
)
def test_every_value_reads_back_as_it_was(value: str) -> None:
    read = yaml.safe_load(fill(TEMPLATE, {"out": value, "data.windows": {"train": value}}, "new"))
    assert read["out"] == value and read["data"]["windows"] == {"train": value}


@pytest.mark.parametrize("value", [None, True, False, 0, [], {}])
def test_values_that_are_no_text_read_back_too(value: object) -> None:
    assert yaml.safe_load(fill(TEMPLATE, {"out": value}, "new"))["out"] == value


def test_the_header_is_replaced() -> None:
    text = fill(TEMPLATE, {}, "one\n  two")
    assert text == "# one\n#   two\n\n" + TEMPLATE.partition("\n\n")[2]


@pytest.mark.parametrize("key", ["outt", "data.source", "trainer.callbacks.Missing.init_args.mode", "out.x"])
def test_a_key_that_the_template_lacks_is_refused(key: str) -> None:
    with pytest.raises(SmartKVError, match=f"the template has no key {key}"):
        fill(TEMPLATE, {key: 1}, "new")
