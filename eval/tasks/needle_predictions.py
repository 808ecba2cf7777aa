"""What gates predict of the keys of a fact in a text, by layer and KV head, beside the keys around it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from eval.common.figures import heads_heatmap
from eval.common.results import save_picture
from eval.common.score_scale import ScoreScale
from eval.tasks.answers import Sample
from smartkv.gates.bank import GateBank
from smartkv.models.backbone import Backbone
from smartkv.models.key_hooks import read_keys


@dataclass(frozen=True)
class Predictions:
    """Mean scores of keys over samples.

    Attributes:
        layers: that have gates.
        fact: of the keys of the fact, float64 `[layers, kv_heads]`.
        text: of the other keys of the text, of the same shape.
        scale: unit and words of the scores.
    """

    layers: list[int]
    fact: Tensor
    text: Tensor
    scale: ScoreScale

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON: scores by layer and head, and amounts in `unit` by layer."""
        amounts = {
            name: [self.scale.amount(float(score)) for score in scores.mean(dim=1)]
            for name, scores in (("fact", self.fact), ("text", self.text))
        }
        return {
            "layers": self.layers,
            "fact": self.fact.tolist(),
            "text": self.text.tolist(),
            "unit": self.scale.caption,
            "by_layer": amounts,
        }

    def table(self) -> Table:
        """Return a table by layer; amounts are means of the scores over heads."""
        figures = self.to_dict()["by_layer"]
        table = Table(title=f"What the gates predict of the fact's keys: {self.scale.caption}")
        for name in ("layer", "fact", "text around it"):
            table.add_column(name, justify="right")
        for layer, fact, text in zip(self.layers, figures["fact"], figures["text"], strict=True):
            table.add_row(str(layer), fact, text)
        return table

    def picture(self, folder: Path) -> Path:
        """Draw how much higher the fact's keys score, head by head."""
        title = "Prediction of the fact's keys above that of the text's"
        above = (self.fact - self.text).numpy()
        return save_picture(heads_heatmap(above, self.layers, title, "score"), folder / "needle_predicted.png")


@torch.inference_mode()
def predictions(lm: Backbone, gates: GateBank, samples: Iterable[Sample]) -> Predictions:
    """Read the prompts with a full cache, and their keys with the gates.

    Args:
        lm: the model.
        gates: the model's, on its device.
        samples: whose `marked` tokens are the fact; at least one.
    """
    shape = (len(gates.layers), gates.fingerprint.kv_heads)
    fact, text, count = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64), 0
    for sample in samples:
        if sample.marked is None:
            continue
        keys = read_keys(lm.model, torch.tensor(sample.prompt))
        inside = torch.zeros(len(sample.prompt), dtype=torch.bool)
        inside[slice(*sample.marked)] = True
        for row, layer in enumerate(gates.layers):
            score = gates.single_score(gates.score(layer, keys[layer]))[0].double().cpu()  # [kv_heads, tokens]
            fact[row] += score[:, inside].mean(dim=1)
            text[row] += score[:, ~inside].mean(dim=1)
        count += 1
    return Predictions(list(gates.layers), fact / count, text / count, ScoreScale.of(gates))
