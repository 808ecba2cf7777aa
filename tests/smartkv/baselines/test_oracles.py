"""Oracle labels against plain loops over the model's own attention weights."""

import pytest
import torch

from smartkv.baselines.oracles import oracle_labels
from smartkv.errors import SmartKVError
from tests.models import FAMILIES, token_ids
from tests.smartkv.cache.fixtures import MODELS


@pytest.mark.parametrize("family", FAMILIES)
def test_lifespan_and_attention_are_those_of_plain_loops(family: str) -> None:
    model, ids, age, threshold = MODELS[family], token_ids(15, 2), 3, 0.12
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(ids[None], output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(implementation)
    oracle = oracle_labels(model, ids, age, threshold)
    for layer, probabilities in enumerate(layers):
        grouped = probabilities[0].unflatten(0, (oracle.lifespan.shape[1], -1)).amax(dim=1)
        for head, strongest in enumerate(grouped):
            for key in range(15):
                hits = [query for query in range(key, 15) if strongest[query, key] > threshold]
                later = [float(strongest[query, key]) for query in range(key + age, 15)]
                assert int(oracle.lifespan[layer, head, key]) == (hits[-1] - key + 1 if hits else 1)
                mean = sum(later) / len(later) if later else 0.0
                assert float(oracle.attention[layer, head, key]) == pytest.approx(mean, abs=1e-5)
    assert oracle.lifespan.float().std() > 0


def test_figures_that_mean_nothing_are_refused() -> None:
    model = MODELS["llama"]
    with pytest.raises(SmartKVError, match="age must be at least 1"):
        oracle_labels(model, token_ids(5), 0)
    with pytest.raises(SmartKVError, match="between 0 and 1"):
        oracle_labels(model, token_ids(5), 1, 1.0)
    with pytest.raises(SmartKVError, match="longer than the model's"):
        oracle_labels(model, torch.zeros(5000, dtype=torch.int64), 1)
