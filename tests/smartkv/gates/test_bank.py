"""The arithmetic and the files of a GateBank."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from tests.harm import Payload
from tests.models import FAMILIES, llama, qwen2

SHAPE = Fingerprint("llama", 4, 2, 8, "feedfacecafebeef")
DETAILS = {"target": "log4 lifespan", "threshold": 0.05, "metrics": {"r2": [0.5, None]}}
quick = settings(deadline=None, max_examples=30, derandomize=True)


def make_bank(layers: list[int] | None = None, outputs: int = 1, seed: int = 0, **parts: Any) -> GateBank:
    """A small random bank."""
    torch.manual_seed(seed)
    return GateBank(
        parts.pop("fingerprint", SHAPE), layers, hidden=6, outputs=outputs, details=parts.pop("details", DETAILS)
    )


def one_gate(bank: GateBank, gate: int) -> nn.Sequential:
    """The same gate built from torch's own layers."""
    alone = nn.Sequential(
        nn.Linear(bank.fingerprint.head_dim, bank.hidden), nn.ReLU(), nn.Linear(bank.hidden, bank.outputs)
    )
    with torch.no_grad():
        alone[0].weight.copy_(bank.weight1[gate].T)
        alone[0].bias.copy_(bank.bias1[gate, 0])
        alone[2].weight.copy_(bank.weight2[gate].T)
        alone[2].bias.copy_(bank.bias2[gate, 0])
    return alone


def keys_for(bank: GateBank, rows: int = 11) -> Tensor:
    return torch.randn(len(bank), rows, bank.fingerprint.head_dim, generator=torch.Generator().manual_seed(1))


# -- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("layers", [None, [1, 3]])
def test_a_bank_answers_as_its_gates_one_by_one(outputs: int, layers: list[int] | None) -> None:
    bank = make_bank(layers, outputs)
    keys = keys_for(bank)
    separate = torch.stack([one_gate(bank, gate)(keys[gate]) for gate in range(len(bank))])
    assert separate.shape == (8 if layers is None else 4, 11, outputs)
    torch.testing.assert_close(bank(keys), separate, atol=1e-6, rtol=0)


def test_gates_that_judge_for_ages_have_an_output_each_and_their_score_falls_with_age() -> None:
    with pytest.raises(SmartKVError, match=r"ages \[4, 16\] need one output per age \(2\), got 1"):
        make_bank(details={"ages": [4, 16]})
    bank = make_bank(outputs=2, details={"ages": [4, 16]})
    keys = torch.randn(1, 2, 50, 8)
    own, score = bank.predict(0, keys), bank.score(0, keys)
    assert bank.ages == (4, 16) and make_bank().ages == ()
    assert torch.equal(score[..., 0], own[..., 0]) and torch.equal(score[..., 1], own.min(dim=-1).values)


def test_gates_are_ordered_by_layer_then_head() -> None:
    assert make_bank([1, 3]).heads == [(1, 0), (1, 1), (3, 0), (3, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layers", [None, [1, 3]])
def test_predicting_a_layer_answers_as_the_whole_bank_does(layers: list[int] | None, dtype: torch.dtype) -> None:
    bank = make_bank(layers, outputs=2)
    keys = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(2)).to(dtype)  # 3 rows of a batch
    for layer in bank.layers:
        predicted = bank.predict(layer, keys)
        assert predicted.dtype == torch.float32
        assert predicted.shape == (3, 2, 5, 2)
        place = bank.heads.index((layer, 0))
        for row in range(3):
            wide = torch.zeros(len(bank), 5, 8)
            wide[place : place + 2] = keys[row].float()
            torch.testing.assert_close(predicted[row], bank(wide)[place : place + 2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", [0, 2, 4, -1])
def test_a_layer_without_gates_is_refused_with_those_that_have_some(layer: int) -> None:
    with pytest.raises(SmartKVError, match=rf"layer {layer} has no gates.* 1,3$"):
        make_bank([1, 3]).predict(layer, torch.zeros(1, 2, 5, 8))


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (2, 0.3), (300, 1), (-300, 20)])
def test_folding_the_standardisation_changes_no_answer(mean: float, std: float) -> None:
    bank = make_bank()
    generator = torch.Generator().manual_seed(3)
    means = mean + torch.randn(len(bank), 8, generator=generator)
    stds = std * (0.5 + torch.rand(len(bank), 8, generator=generator))
    standard = keys_for(bank)
    raw = means[:, None] + stds[:, None] * standard
    folded = bank.folded(means, stds)
    torch.testing.assert_close(folded(raw), bank((raw - means[:, None]) / stds[:, None]), atol=1e-4, rtol=0)


def test_folding_leaves_the_bank_itself_as_it_was() -> None:
    bank = make_bank([1, 3])
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    folded = bank.folded(torch.ones(4, 8), 2 * torch.ones(4, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bank.state_dict().items())
    assert (folded.layers, folded.fingerprint, folded.details) == (bank.layers, bank.fingerprint, bank.details)


def test_a_bank_starts_within_the_range_of_torchs_linear() -> None:
    bank = make_bank()
    for parameter, fan_in in ((bank.weight1, 8), (bank.bias1, 8), (bank.weight2, 6), (bank.bias2, 6)):
        assert parameter.abs().max() <= fan_in**-0.5
        assert parameter.abs().max() > 0.6 * fan_in**-0.5


# -- files ------------------------------------------------------------------------------------------------------------


def saved(bank: GateBank, folder: Path) -> Path:
    bank.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layers", [None, [1, 3]])
def test_a_saved_bank_loads_exactly_as_it_was(layers: list[int] | None, tmp_path: Path) -> None:
    bank = make_bank(layers, outputs=2)
    back = GateBank.from_pretrained(saved(bank, tmp_path))
    assert (back.fingerprint, back.layers, back.hidden, back.outputs, back.details) == (
        bank.fingerprint, bank.layers, 6, 2, DETAILS,
    )  # fmt: skip
    assert back.state_dict().keys() == bank.state_dict().keys()
    assert all(torch.equal(tensor, bank.state_dict()[name]) for name, tensor in back.state_dict().items())
    assert not back.training


def test_a_bank_in_float16_is_half_as_large_on_disk_and_computes_in_float32(tmp_path: Path) -> None:
    bank = make_bank()
    sizes = {}
    for name, dtype in (("wide", torch.float32), ("half", torch.float16)):
        sizes[name] = sum(
            t.nbytes for t in load_file(saved(bank.to(dtype), tmp_path / name) / "model.safetensors").values()
        )
    back = GateBank.from_pretrained(tmp_path / "half")
    assert sizes["half"] * 2 == sizes["wide"]
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, bank.float().state_dict()[name], atol=1e-3, rtol=1e-3)


def test_saving_twice_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        saved(make_bank(), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_load_for_the_model_they_were_made_for(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = FAMILIES[family]()
    folder = saved(make_bank(fingerprint=Fingerprint.of(model)), tmp_path)
    with caplog.at_level(logging.WARNING):
        GateBank.from_pretrained(folder, model=model)
    assert caplog.text == ""


def test_gates_for_another_architecture_are_refused_naming_both(tmp_path: Path) -> None:
    other = Fingerprint.of(llama(num_hidden_layers=1))
    model = qwen2()
    with pytest.raises(SmartKVError) as error:
        GateBank.from_pretrained(saved(make_bank(fingerprint=other), tmp_path), model=model)
    for part in (other.describe(), Fingerprint.of(model).describe(), str(tmp_path)):
        assert part in str(error.value)


def test_gates_of_other_weights_of_the_architecture_load_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bank = make_bank(fingerprint=Fingerprint.of(llama(seed=0)))
    with caplog.at_level(logging.WARNING):
        back = GateBank.from_pretrained(saved(bank, tmp_path), model=llama(seed=1))
    assert "other weights" in caplog.text
    assert torch.equal(back.weight1, bank.weight1)


def test_pickled_weights_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    folder, ran = saved(make_bank(), tmp_path / "gates"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(SmartKVError, match=r"model\.safetensors is missing"):
        GateBank.from_pretrained(folder)
    assert not ran.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert ran.exists()  # the payload was live


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_cut_off_weights_are_refused_by_name(left: int, tmp_path: Path) -> None:
    weights = saved(make_bank(), tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(SmartKVError, match=r"model\.safetensors"):
        GateBank.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["a tensor is missing", "a tensor too many", "another shape"])
def test_weights_that_are_not_those_of_the_config_are_refused(change: str, tmp_path: Path) -> None:
    path = saved(make_bank(), tmp_path) / "model.safetensors"
    tensors = load_file(path)
    if change == "a tensor is missing":
        del tensors["bias2"]
    else:
        tensors["bias2" if change == "another shape" else "bias3"] = torch.zeros(1, 1, 1)
    save_file(tensors, path)
    with pytest.raises(SmartKVError, match=r"model\.safetensors does not hold the gates"):
        GateBank.from_pretrained(tmp_path)


def test_new_weights_beside_an_old_config_are_refused(tmp_path: Path) -> None:
    """An export killed between its two files leaves prices and a policy that belong to other weights."""
    old, new = saved(make_bank(seed=0), tmp_path / "old"), saved(make_bank(seed=1), tmp_path / "new")
    (new / "model.safetensors").replace(old / "model.safetensors")
    with pytest.raises(SmartKVError, match=r"model\.safetensors was not written together with its config\.json"):
        GateBank.from_pretrained(old)


@pytest.mark.parametrize("key", ["fingerprint", "layers", "hidden", "outputs", "details"])
def test_a_config_without_a_key_is_refused_by_that_key(key: str, tmp_path: Path) -> None:
    path = saved(make_bank(), tmp_path) / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    with pytest.raises(SmartKVError, match=rf"config\.json does not describe gates.*{key}"):
        GateBank.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_a_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (saved(make_bank(), tmp_path) / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SmartKVError, match=r"config\.json does not describe gates"):
        GateBank.from_pretrained(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("hidden", -1), ("hidden", "6"), ("layers", 3), ("outputs", None)])
def test_a_config_with_a_value_that_makes_no_gates_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    path = saved(make_bank(), tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(SmartKVError, match=r"config\.json"):
        GateBank.from_pretrained(tmp_path)


def test_a_config_of_another_format_version_is_refused_naming_it(tmp_path: Path) -> None:
    path = saved(make_bank(), tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(SmartKVError, match="version 99"):
        GateBank.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nobody/no-such-gates", "runs/no/such/folder", "/no/such/folder"])
def test_gates_that_are_not_there_are_named(name: str) -> None:
    with pytest.raises(SmartKVError, match=f"'{name}'"):
        GateBank.from_pretrained(name)


@pytest.mark.parametrize("layers", [None, [1, 3]])
def test_exported_heads_load_into_torchs_own_layers(layers: list[int] | None, tmp_path: Path) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))

    bank = make_bank(layers)
    bank.export_heads(tmp_path)
    keys = keys_for(bank)
    expected = bank(keys)
    assert {path.name for path in tmp_path.iterdir()} == {f"l{a}_h{b}.safetensors" for a, b in bank.heads}
    for gate, (layer, head) in enumerate(bank.heads):
        alone = Gate()
        alone.load_state_dict(load_file(tmp_path / f"l{layer}_h{head}.safetensors"))
        torch.testing.assert_close(alone.net(keys[gate]), expected[gate], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gates_cast_to_another_dtype_still_read_keys_of_any(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bank = GateBank(Fingerprint("llama", 1, 2, 8, "0"))
    keys = torch.randn(1, 2, 5, 8)
    want = bank.predict(0, keys)
    got = bank.to(dtype).predict(0, keys.bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0.05, rtol=0)
