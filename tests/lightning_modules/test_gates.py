"""Training all gates at once: as if each were alone, exact figures, and something learned."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.block_loader import BlockLoader, BlockReader, KeyBatch
from smartkv.gates.bank import head_name
from smartkv.gates.objectives import FutureAttention, Log4Lifespan, Objective, OrdinalAges, Ranking
from smartkv.metrics.nulls import score_nulls
from tests.lightning_fixtures import (
    Watcher,
    fit_by_trainer,
    harvest_by_trainer,
    labelled,
    last_logged,
    lifespan_of,
    logged,
    made_keys,
    validation_keys,
    weights,
    write_made_shards,
)


@pytest.fixture(scope="module")
def learnable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards where the key alone decides the lifespan, and keys_post_rope know nothing of it."""
    keys = {"train": made_keys(10, 256, seed=0), "validation": made_keys(4, 256, seed=1)}
    lifespans = {split: [lifespan_of(window) for window in windows] for split, windows in keys.items()}
    rotated = {"train": made_keys(10, 256, seed=2), "validation": made_keys(4, 256, seed=3)}
    return write_made_shards(tmp_path_factory.mktemp("learnable"), lifespans, keys, rotated=rotated)


LEARN: dict[str, Any] = {
    "model": {"hidden": 32, "learning_rate": 0.01},
    "data": {"batch_size": 256, "block": 64},
    "trainer": {"max_epochs": 12},
}


# -- a head learns as if it were trained alone ------------------------------------------------------------------------


def alone(start: dict[str, Tensor], gate: int) -> nn.Sequential:
    """One gate as a module of its own, with the weights it had at the start."""
    head_dim, hidden = start["weight1"][gate].shape
    net = nn.Sequential(nn.Linear(head_dim, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    with torch.no_grad():
        for layer, number in ((net[0], 1), (net[2], 2)):
            layer.weight.copy_(start[f"weight{number}"][gate].T)
            layer.bias.copy_(start[f"bias{number}"][gate, 0])
    return net


def first_batch(watcher: Watcher) -> KeyBatch:
    rows = watcher.datamodule.rows
    return next(iter(BlockLoader(BlockReader(rows), rows.blocks("train", 8), 24, 0, rank=0, world_size=1)))


def train_alone(net: nn.Sequential, batches: Sequence[tuple[Tensor, Tensor]], loss: str, steps: int) -> None:
    """The recipe of the documentation for one head: AdamW, weight decay on weights, warm-up of 2 steps, cosine."""
    groups = [
        {"params": [net[0].weight, net[2].weight], "weight_decay": 0.01},
        {"params": [net[0].bias, net[2].bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    for step, (keys, target) in enumerate(batches):
        factor = (step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / (steps - 2)))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * factor
        prediction = net(keys)[:, 0]
        error = F.huber_loss(prediction, target, delta=0.5) if loss == "huber" else F.mse_loss(prediction, target)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()


@pytest.mark.parametrize("loss", ["huber", "mse"])
def test_training_all_gates_together_equals_training_each_alone(tiny_shards: Path, tmp_path: Path, loss: str) -> None:
    steps = 6
    watcher = fit_by_trainer(
        tiny_shards,
        tmp_path,
        model={"objective": Log4Lifespan(loss, 0.5)},
        trainer={"max_steps": steps, "max_epochs": 1, "limit_val_batches": 0},
    )
    rows = watcher.datamodule.rows
    truth = labelled(tiny_shards, "train")["keys"].double()
    mean, std = truth.mean(dim=1), truth.std(dim=1, correction=0)
    batches = list(BlockLoader(BlockReader(rows), rows.blocks("train", 8), 24, 0, rank=0, world_size=1))[:steps]
    for gate in range(rows.gates):
        net = alone(watcher.start, gate)
        own = [(((b.keys[gate].double() - mean[gate]) / std[gate]).float(), b.target[gate]) for b in batches]
        train_alone(net, own, loss, steps)
        expected = alone(weights(watcher.module), gate)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(expected.get_parameter(name), parameter, rtol=0, atol=1e-5)


def test_a_head_s_gradient_does_not_depend_on_other_heads(tmp_path: Path) -> None:
    keys = {"train": made_keys(2, 64, seed=0), "validation": made_keys(1, 64, seed=1)}
    gradients = []
    for number in range(2):
        lifespans = {split: [lifespan_of(window) for window in windows] for split, windows in keys.items()}
        if number:
            for window in lifespans["train"]:
                window[0, 1] = window[0, 1].flip(0)  # head 1 is given other labels
        folder = write_made_shards(tmp_path / str(number), lifespans, keys)
        gradients.append(fit_by_trainer(folder, tmp_path / f"fit{number}", trainer={"max_steps": 1}).gradients)
    for name in ("weight1", "bias1", "weight2", "bias2"):
        assert torch.equal(gradients[0][name][0], gradients[1][name][0])
        assert not torch.allclose(gradients[0][name][1], gradients[1][name][1])


def test_the_loss_is_a_sum_over_heads_of_each_head_s_mean_over_rows(trained: Watcher) -> None:
    batch, module = first_batch(trained), trained.module
    for gate in range(4):
        net = alone(trained.start, gate)
        keys = (batch.keys[gate].float() - module.key_mean[gate]) / module.key_std[gate]
        F.huber_loss(net(keys)[:, 0], batch.target[gate]).backward()
        found = {name: gradient[gate] for name, gradient in trained.gradients.items()}
        torch.testing.assert_close(found["weight1"], net[0].weight.grad.T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["bias1"][0], net[0].bias.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["weight2"], net[2].weight.grad.T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["bias2"][0], net[2].bias.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "limit",
    [{"max_epochs": 2}, {"max_steps": 6}, {"max_epochs": 1, "max_steps": 100}, {"limit_train_batches": 4}],
    ids=["epochs", "steps", "epochs before steps", "part of each epoch"],
)
def test_the_learning_rate_has_come_down_to_zero_when_the_run_ends(
    tiny_shards: Path, tmp_path: Path, limit: dict[str, int]
) -> None:
    watcher = fit_by_trainer(tiny_shards, tmp_path, trainer={"limit_val_batches": 0, **limit})
    assert watcher.module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_single_gate_can_be_trained(tmp_path: Path) -> None:
    keys = {"train": made_keys(2, 64, 0, kv_heads=1), "validation": made_keys(1, 64, 1, kv_heads=1)}
    lifespans = {split: [lifespan_of(window) for window in windows] for split, windows in keys.items()}
    watcher = fit_by_trainer(write_made_shards(tmp_path / "shards", lifespans, keys), tmp_path / "fit")
    assert watcher.module.bank.heads == [(0, 0)]


def test_inputs_are_standardised_by_the_training_keys(tiny_shards: Path, trained: Watcher) -> None:
    keys = labelled(tiny_shards, "train")["keys"].double()
    torch.testing.assert_close(trained.module.key_mean.double(), keys.mean(dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trained.module.key_std.double(), keys.std(dim=1, correction=0), rtol=1e-5, atol=1e-6)


def test_each_gate_starts_at_its_mean_target(tiny_shards: Path, trained: Watcher) -> None:
    mean = labelled(tiny_shards, "train")["target"].mean(dim=1)
    torch.testing.assert_close(trained.start["bias2"][:, 0, 0].double(), mean, rtol=1e-5, atol=1e-6)


# -- figures ----------------------------------------------------------------------------------------------------------


def naive_r2(prediction: Tensor, target: Tensor) -> Tensor:
    """`[gates]`, in float64."""
    wide = target.double()
    residual = (prediction.double() - wide).square().sum(dim=1)
    return 1 - residual / (wide - wide.mean(dim=1, keepdim=True)).square().sum(dim=1)


def test_r2_by_head_equals_the_naive_formula_on_the_validation_rows(tiny_shards: Path, trained: Watcher) -> None:
    truth = labelled(tiny_shards, "validation")
    expected = naive_r2(trained.module(truth["keys"]).detach(), truth["target"])
    torch.testing.assert_close(trained.module.val_r2_head, expected, rtol=1e-4, atol=1e-5)


def test_r2_is_logged_by_head_under_its_name(root: Path, trained: Watcher) -> None:
    heads = {name: value for name, value in last_logged(root).items() if name.startswith("val_r2_head/")}
    expected = dict(zip(["L00H0", "L00H1", "L01H0", "L01H1"], trained.module.val_r2_head.tolist(), strict=True))
    assert heads == pytest.approx({f"val_r2_head/{name}": value for name, value in expected.items()}, abs=1e-5)


def test_head_names_sort_by_layer_beyond_ten() -> None:
    assert [head_name(layer, head) for layer, head in ((0, 0), (7, 1), (23, 1))] == ["L00H0", "L07H1", "L23H1"]


def test_the_summary_of_r2_is_logged(root: Path, trained: Watcher) -> None:
    r2, found = trained.module.val_r2_head, last_logged(root)
    expected = {"mean": r2.mean(), "median": r2.quantile(0.5), "p10": r2.quantile(0.1), "min": r2.min()}
    for name, value in expected.items():
        assert found[f"val_r2_{name}"] == pytest.approx(float(value), abs=1e-5)


def test_validation_loss_by_head_is_its_mean_over_rows(tiny_shards: Path, root: Path, trained: Watcher) -> None:
    truth = labelled(tiny_shards, "validation")
    prediction = trained.module(truth["keys"]).detach().double()
    losses = F.huber_loss(prediction, truth["target"], reduction="none").mean(dim=1)
    found = last_logged(root)
    for head, loss in zip(["L00H0", "L00H1", "L01H0", "L01H1"], losses.tolist(), strict=True):
        assert found[f"val_loss_head/{head}"] == pytest.approx(loss, rel=1e-4)


def test_training_loss_is_logged_by_head_each_epoch(root: Path, trained: Watcher) -> None:
    rows = [row for row in logged(root) if "train_loss_head/L00H0" in row]
    assert len(rows) == 2
    assert {name for name in rows[0] if name.startswith("train_loss_head/")} == {
        f"train_loss_head/{head_name(*head)}" for head in trained.module.bank.heads
    }


def test_training_loss_is_the_mean_over_heads_and_rows_of_the_batch(root: Path, trained: Watcher) -> None:
    batch = first_batch(trained)
    standard = (batch.keys.float() - trained.module.key_mean[:, None]) / trained.module.key_std[:, None]
    start = trained.start
    hidden = (standard @ start["weight1"] + start["bias1"]).relu()
    prediction = (hidden @ start["weight2"] + start["bias2"]).squeeze(-1)
    expected = float(F.huber_loss(prediction, batch.target))
    assert next(row["train_loss"] for row in logged(root) if "train_loss" in row) == pytest.approx(expected, rel=1e-4)


# -- what is learned --------------------------------------------------------------------------------------------------


def test_a_lifespan_that_the_key_decides_is_learned(learnable: Path, tmp_path: Path) -> None:
    assert fit_by_trainer(learnable, tmp_path, **LEARN).module.val_r2_head.min() > 0.8


def test_the_token_table_learns_nothing_where_tokens_say_nothing(learnable: Path, tmp_path: Path) -> None:
    watcher = fit_by_trainer(learnable, tmp_path, trainer={"max_steps": 1})
    assert score_nulls(watcher.datamodule.rows)["token_table"].r2().abs().max() < 0.1


def test_inputs_decide_which_keys_are_read(learnable: Path, tmp_path: Path) -> None:
    settings = {**LEARN, "data": {**LEARN["data"], "inputs": "keys_post_rope"}}
    watcher = fit_by_trainer(learnable, tmp_path, **settings)
    rotated = labelled(learnable, "train", keys="keys_post_rope")["keys"].double()
    torch.testing.assert_close(watcher.module.key_mean.double(), rotated.mean(dim=1), rtol=1e-5, atol=1e-6)
    assert watcher.module.val_r2_head.max() < 0.3  # here the lifespan is in the other keys


def test_gates_learn_from_harvested_keys_post_rope(tmp_path: Path, tiny_backbone: Path, tiny_texts: Path) -> None:
    counts = {"train": 2, "validation": 1}
    shards = harvest_by_trainer(
        tmp_path / "shards", tiny_backbone, tiny_texts, windows=counts, model={"post_rope": True}
    )
    watcher = fit_by_trainer(shards, tmp_path / "fit", data={"inputs": "keys_post_rope"})
    keys = validation_keys(watcher.datamodule)
    assert torch.equal(keys, labelled(shards, "validation", keys="keys_post_rope")["keys"])
    assert torch.isfinite(watcher.module.val_r2_head).all()


def test_layers_choose_the_gates_that_are_trained(tiny_shards: Path, trained: Watcher, tmp_path: Path) -> None:
    watcher = fit_by_trainer(tiny_shards, tmp_path, data={"layers": "0-0"})
    assert watcher.module.bank.heads == [(0, 0), (0, 1)]
    torch.testing.assert_close(watcher.module.key_mean, trained.module.key_mean[:2])
    assert {name for name in last_logged(tmp_path) if "_head/" in name} == {
        f"{figure}_head/{head}" for figure in ("val_r2", "val_loss", "train_loss") for head in ("L00H0", "L00H1")
    }


@pytest.mark.parametrize("objective", [OrdinalAges([2, 8]), FutureAttention([8]), Ranking(2)], ids=lambda o: o.target)
def test_gates_learn_every_objective_and_a_cache_reads_them(
    objective: Objective, tiny_shards: Path, tmp_path: Path
) -> None:
    watcher = fit_by_trainer(tiny_shards, tmp_path, model={"objective": objective, "learning_rate": 0.02})
    history = [sum(epoch["train"]) for epoch in watcher.module.loss_history]
    assert history[-1] < history[0] - 1e-3 * abs(history[0])
    assert ("val_r2_mean" in watcher.module.trainer.callback_metrics) == objective.in_log4
    gates = watcher.module.gates()
    gates.details = {"target": objective.target, "objective": objective.settings}
    keys = validation_keys(watcher.datamodule)
    layer = keys.unflatten(0, (2, 2))[1][None]  # [1, kv_heads, rows, head_dim]
    want = watcher.module(keys).unflatten(0, (2, 2))[1][None]
    torch.testing.assert_close(gates.score(1, layer), want, atol=1e-4, rtol=1e-4)
