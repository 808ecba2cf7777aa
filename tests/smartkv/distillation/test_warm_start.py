"""Gates that distillation starts from, beside the gates they come from."""

import math

import pytest
import torch

from smartkv.distillation.warm_start import one_output_per_age, single_output
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.objectives import FutureAttention, OrdinalAges
from smartkv.models.architecture import Fingerprint


@pytest.mark.parametrize("hidden", [4, 12])
def test_gates_for_ages_start_as_the_gates_they_come_from_and_kinder_to_young_keys(hidden: int) -> None:
    torch.manual_seed(0)
    gates = GateBank(Fingerprint("llama", 2, 2, 8, "0"), hidden=4)
    aged = one_output_per_age(gates, (16, 64, 256), hidden)
    keys = torch.randn(1, 2, 50, 8)
    want, got = gates.predict(1, keys), aged.predict(1, keys)
    kinder = torch.tensor([math.log(4), math.log(2), 0.0])
    torch.testing.assert_close(got, want + kinder, atol=0.02 if hidden > 4 else 1e-6, rtol=0)
    assert aged.hidden == hidden and aged.ages == (16, 64, 256)
    if hidden > 4:  # the copies of a unit can learn different things
        assert not torch.equal(aged.weight1[..., :4], aged.weight1[..., 4:8])
    again = one_output_per_age(aged, (16, 64, 256), hidden)
    torch.testing.assert_close(again.predict(1, keys), got)


def test_gates_of_future_attention_start_as_its_log_at_each_age() -> None:
    objective = FutureAttention((16, 64, 256), scale=50.0)
    details = {"target": objective.target, "objective": objective.settings}
    gates = GateBank(Fingerprint("llama", 2, 2, 8, "0"), hidden=4, outputs=3, details=details)
    start, keys = single_output(gates), torch.randn(1, 2, 50, 8)
    mean_attention = gates.score(1, keys).exp()  # over the ages, as the objective reads it
    torch.testing.assert_close(start.predict(1, keys).exp().mean(dim=-1), mean_attention)
    aged = one_output_per_age(start, (16, 64, 256), 4)
    torch.testing.assert_close(aged.predict(1, keys), start.predict(1, keys))
    torch.testing.assert_close(start.score(1, keys), start.predict(1, keys)[..., 0])


def test_gates_of_ordinal_ages_are_no_start() -> None:
    details = {"target": OrdinalAges.target, "objective": {"ages": [4, 16, 64]}}
    with pytest.raises(SmartKVError, match="got gates for 'life beyond ages'"):
        single_output(GateBank(Fingerprint("llama", 1, 1, 8, "0"), hidden=4, outputs=3, details=details))


def test_a_width_that_is_no_multiple_is_refused() -> None:
    gates = GateBank(Fingerprint("llama", 1, 1, 8, "0"), hidden=4)
    with pytest.raises(SmartKVError, match="multiple of the 4 hidden units of the gates, got 6"):
        one_output_per_age(gates, (16,), 6)


def test_gates_with_one_output_or_for_ages_are_a_start_as_they_are() -> None:
    fingerprint = Fingerprint("llama", 1, 1, 8, "0")
    for gates in (GateBank(fingerprint), GateBank(fingerprint, outputs=2, details={"ages": [4, 16]})):
        assert single_output(gates) is gates
