"""The kernels as they would run on an H100: compiled for sm_90 without a GPU. `make test-triton` runs it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("triton") is None:
    pytest.skip("needs triton: make test-triton", allow_module_level=True)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-W", "ignore", "-m", "tests.smartkv.kernels.compiling"]
    lines = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_no_kernel_spills_registers(compiled: list[dict[str, Any]]) -> None:
    assert len(compiled) == 18
    assert {(row["kernel"], row["dtype"], row["model"]): row["spilled"] for row in compiled if row["spilled"]} == {}


def test_attention_multiplies_matrices_of_bfloat16_and_loads_keys_ahead(compiled: list[dict[str, Any]]) -> None:
    rows = [row for row in compiled if row["kernel"] != "merge" and row["dtype"] == "bfloat16"]
    assert len(rows) == 6 and all(row["matrix"] and row["asynchronous"] for row in rows)
    assert all(row["registers"] <= 128 for row in rows if row["kernel"] == "attend")


def test_float32_is_multiplied_in_full_precision(compiled: list[dict[str, Any]]) -> None:
    """Matrix units would round the factors to 11 bits (TF32)."""
    assert {row["matrix"] for row in compiled if row["dtype"] == "float32"} == {0}
