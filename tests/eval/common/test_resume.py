"""Measured figures on disk, and digests."""

import json
from pathlib import Path

import pytest
import torch

from eval.common.resume import Measurements, digest, digest_of_model, digests
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from tests.models import llama


def test_a_figure_is_measured_once_and_read_by_the_next_run(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"nll": 0.5}

    for _ in range(2):
        figures = Measurements(tmp_path / "x.cells", {"seed": 0}).measured(["window", 0.25], measure)
        assert figures == {"nll": 0.5}
    assert len(calls) == 1


@pytest.mark.parametrize(("settings", "key"), [({"seed": 1}, ["window"]), ({"seed": 0}, ["h2o"])])
def test_other_settings_and_other_keys_are_measured_anew_and_the_first_stay(
    settings: dict[str, int], key: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.cells"
    Measurements(path, {"seed": 0}).measured(["window"], lambda: 1)
    assert Measurements(path, settings).measured(key, lambda: 2) == 2
    assert Measurements(path, {"seed": 0}).measured(["window"], lambda: 3) == 1
    assert sorted(json.loads(path.read_text()).values()) == [1, 2]


def test_the_name_of_a_figure_is_that_of_version_0_1(tmp_path: Path) -> None:
    path = tmp_path / "x.cells"
    Measurements(path, {"b": 1, "a": [2.5]}).measured(["window", {"price": 0.25}], lambda: 0)
    assert list(json.loads(path.read_text())) == ["14f428928d0beeb46a192f7b"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.cells").write_text("{")
    with pytest.raises(SmartKVError, match="cannot be read"):
        Measurements(tmp_path / "x.cells", {})


def test_a_digest_is_of_the_content_and_not_of_the_layout() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    assert digest(tensor) == digest(tensor.T.contiguous().T) != digest(tensor + 1)
    assert digest(tensor.bfloat16()) != digest(tensor) and len(digest(tensor)) == 16


def test_the_digest_of_a_model_changes_with_any_trained_weight() -> None:
    model = llama()
    before = digest_of_model(model)
    assert digest_of_model(llama()) == before
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    assert digest_of_model(model) != before


def test_gates_have_a_digest_for_each_weight(random_gates: Path) -> None:
    gates = GateBank.from_pretrained(random_gates)
    assert digests(gates) == {name: digest(weight) for name, weight in gates.state_dict().items()}
    assert digests(None) == {}
