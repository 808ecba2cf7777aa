"""The line in which a command tells of an error, and the errors that get none."""

import errno

import pytest
import torch.multiprocessing as multiprocessing
from torch.multiprocessing import ProcessRaisedException

from smartkv.errors import UNWRITABLE, FootprintOutOfReach, SmartKVError, error_line, one_line_errors
from smartkv.shards.shard_file import DamagedFile


def test_a_mistake_is_told_by_its_message() -> None:
    assert error_line(SmartKVError("rank must be at least 1, got 0")) == "rank must be at least 1, got 0"
    assert error_line(FootprintOutOfReach("out of reach")) == "out of reach"


@pytest.mark.parametrize("number", UNWRITABLE)
def test_a_disk_or_folder_that_cannot_be_written_to_is_told_with_its_file(number: int) -> None:
    assert error_line(OSError(number, "the reason", "runs/x")) == "runs/x could not be written: the reason"
    assert error_line(OSError(number, "the reason")) == "a file could not be written: the reason"


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.ENOENT, "gone", "x"), KeyError("x")])
def test_any_other_error_has_no_line(error: Exception) -> None:
    assert error_line(error) is None


def _fail(rank: int, kind: type[Exception]) -> None:
    raise kind("expected 3,\ngot 4")


@pytest.mark.parametrize(
    ("kind", "line"),
    [(SmartKVError, "expected 3,"), (DamagedFile, "expected 3,"), (ValueError, None)],
    ids=["mistake", "subclass", "bug"],
)
def test_a_mistake_in_another_process_is_told_by_the_first_line_of_its_message(
    kind: type[Exception], line: str | None
) -> None:
    with pytest.raises(ProcessRaisedException) as raised:
        multiprocessing.start_processes(_fail, (kind,), nprocs=1, start_method="fork")
    assert error_line(raised.value) == line


def test_a_command_ends_with_the_line_on_stderr_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise SmartKVError("model 'x' is unknown")
    captured = capsys.readouterr()
    assert (ended.value.code, captured.err, captured.out) == (2, "error: model 'x' is unknown\n", "")


def test_an_error_without_a_line_passes_through_a_command_as_it_is() -> None:
    with pytest.raises(ValueError, match="a bug"), one_line_errors():
        raise ValueError("a bug")
