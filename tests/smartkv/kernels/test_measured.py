"""The check of a GPU measures the kernels that caches use, here in Triton's interpreter (`make test-triton`)."""

import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs triton's interpreter: make test-triton", allow_module_level=True)

from eval.gpu.one_layer import one_layer
from eval.gpu.shapes import TINY


def test_the_ranges_are_right_however_many_programs_share_them() -> None:
    _, *ranges, _, _ = one_layer(TINY["tiny Llama"], 1, 48, 0.5, torch.device("cpu"), torch.float32)
    assert len(ranges) == 3 and all(row["error"] < 1e-5 for row in ranges)
