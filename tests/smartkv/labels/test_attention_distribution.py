"""The distribution of attention against numpy on all probabilities."""

import numpy as np
import pytest
import torch

from smartkv.labels.attention_distribution import PERCENTILES, AttentionDistribution, AttentionDistributionObserver
from smartkv.labels.lifespans import LabelSpec, label_window
from smartkv.models.backbone import freeze
from tests.models import llama, tiny_tokenizer, token_ids

LENGTH, SINKS = 150, 4  # more than a tile of queries


@pytest.fixture
def measured() -> tuple[AttentionDistributionObserver, np.ndarray]:
    """An observer after one window, and every causal probability of every layer `[layers, pairs]`."""
    model, tokens = llama(), token_ids(LENGTH)
    observer = AttentionDistributionObserver(2, LabelSpec((0.05,), (), 32), SINKS)
    observer.run(freeze(model, tiny_tokenizer(), "tiny"), tokens)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(tokens[None], output_attentions=True).attentions
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return observer, np.stack([attention[0][:, causal].flatten().double().numpy() for attention in attentions])


def of(*probabilities: float) -> AttentionDistribution:
    """The distribution of one query's probabilities."""
    distribution, row = AttentionDistribution.empty(), torch.tensor(probabilities)[None, None, None]
    distribution.update(len(probabilities) - 1, row, sinks=1)
    return distribution


@pytest.mark.parametrize("percent", PERCENTILES)
def test_percentiles_are_within_a_thousandth_of_numpys(percent: float, measured: tuple) -> None:
    observer, pairs = measured
    for distribution, values in zip(observer.distributions, pairs, strict=True):
        low, high = (np.percentile(values, percent, method=side) for side in ("lower", "higher"))
        assert low * 0.999 <= distribution.percentile(percent) <= high * 1.001


def test_extremes_mean_and_count_are_exact(measured: tuple) -> None:
    observer, pairs = measured
    for distribution, values in zip(observer.distributions, pairs, strict=True):
        summary = distribution.summary([0.05])
        assert summary["pairs"] == values.size
        assert summary["min"] == pytest.approx(values.min(), rel=1e-4)
        assert summary["max"] == pytest.approx(values.max(), rel=1e-4)
        assert summary["mean"] == pytest.approx(2 / (LENGTH + 1), rel=1e-5)  # rows sum to 1


def test_all_heads_are_the_layers_together(measured: tuple) -> None:
    observer, pairs = measured
    merged = AttentionDistribution.merged(observer.distributions)
    assert merged.percentile(99) == pytest.approx(np.percentile(pairs, 99), rel=2e-3)
    assert merged.high == max(d.high for d in observer.distributions)
    assert merged.low == min(d.low for d in observer.distributions)
    assert merged.rows == 2 * 4 * LENGTH  # layers × query heads × queries
    assert merged.total == pytest.approx(merged.rows, rel=1e-5)  # rows sum to 1
    parts = [d.summary([])["share_on_sinks"] for d in observer.distributions]
    assert merged.summary([])["share_on_sinks"] == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_a_few_pairs_in_one_bin_beside_many_in_the_next_keep_their_percentile() -> None:
    values = [0.5] * 1000 + [0.50049] + [0.9] * 10  # the second lies in the next bin
    assert of(*values).percentile(100 * 1000.5 / 1011) == pytest.approx(0.5005, rel=1e-3)
    assert of(*[0.5] * 1000, 0.9).percentile(100 * 999 / 1001) == pytest.approx(0.5, rel=1.1e-3)


def test_a_key_in_a_querys_future_is_no_pair() -> None:
    distribution = AttentionDistribution.empty()
    distribution.update(0, torch.tensor([[1.0, 0.0], [0.25, 0.75]])[None, None], sinks=1)
    summary = distribution.summary([])
    assert (summary["pairs"], summary["min"]) == (3, 0.25)
    assert distribution.counts[0] == 0 and distribution.counts.min() == 0
    assert distribution.percentile(1) == pytest.approx(0.25, rel=1e-3)


def test_a_key_that_a_sliding_window_hides_is_a_pair_of_probability_0() -> None:
    summary = of(0.0, 0.25, 0.75).summary([0.1])
    assert (summary["pairs"], summary["min"], summary["max"]) == (3, 0.0, 0.75)
    assert summary["share_above"]["0.1"]["pairs"] == pytest.approx(2 / 3)
    assert of(0.0, 0.25, 0.75).percentile(10) == pytest.approx(0.0, abs=1e-30)


def test_a_summary_has_the_figures_of_a_report(measured: tuple) -> None:
    distribution, values = measured[0].distributions[0], measured[1][0]
    summary = distribution.summary([0.05])
    assert list(summary) == [
        *[
            "pairs",
            "min",
            "max",
            "mean",
            "median",
            "percentiles",
            "suggested_threshold",
            "share_above",
            "share_on_sinks",
        ]
    ]
    assert summary["median"] == pytest.approx(np.median(values), rel=1e-3)
    assert summary["percentiles"] == {f"{p:g}": distribution.percentile(p) for p in PERCENTILES}
    assert summary["share_above"] == {
        f"{t:.4g}": distribution.share_above(t) for t in (0.05, summary["suggested_threshold"])
    }


@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.1])
def test_shares_above_a_threshold_are_those_of_a_count(threshold: float, measured: tuple) -> None:
    observer, pairs = measured
    share = observer.distributions[1].share_above(threshold)
    above = pairs[1][pairs[1] > threshold]
    assert share["pairs"] == pytest.approx(above.size / pairs[1].size, abs=1e-3)
    assert share["attention"] == pytest.approx(above.sum() / pairs[1].sum(), abs=2e-3)


def test_the_suggestion_is_the_99th_percentile(measured: tuple) -> None:
    distribution = measured[0].distributions[0]
    assert distribution.summary([])["suggested_threshold"] == distribution.percentile(99)


def test_attention_on_sinks_is_that_of_the_first_keys(measured: tuple) -> None:
    observer, _ = measured
    model, tokens = llama(), token_ids(LENGTH)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(tokens[None], output_attentions=True).attentions[0][0]
    expected = float(attention[..., :SINKS].sum() / attention.sum())
    assert observer.distributions[0].summary([])["share_on_sinks"] == pytest.approx(expected, rel=1e-4)


def test_lifespans_are_those_of_a_harvest(measured: tuple) -> None:
    labels = label_window(llama(), token_ids(LENGTH), LabelSpec((0.05,), (), 32))
    assert torch.equal(measured[0].lifespans[0], labels.lifespan)
