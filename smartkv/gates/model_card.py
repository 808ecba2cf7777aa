"""The model card (`README.md`) written beside exported gates."""

import json
from typing import Any


def model_card(gates: int, model: str, layers: str, details: dict[str, Any]) -> str:
    """Write the model card of exported gates.

    The card shows how to use the gates. With a policy and its prices in `details` it shows a cache and a table of
    prices, otherwise the predictions of one layer.

    Args:
        gates: Number of gates.
        model: Description of the model's architecture.
        layers: Ranges of the layers that have gates, such as "0-29".
        details: Details of the gates, as in their `config.json`.

    Returns:
        Markdown with the front matter of a hub model card.
    """
    has_prices = bool(details.get("policy") and details.get("prices"))
    snippet = _cache_snippet(details) if has_prices else _PREDICT_SNIPPET
    settings = {name: value for name, value in details.items() if name != "prices"}
    return f"""---
library_name: smartkv
tags: [kv-cache, key-eviction]
---

# SmartKV gates

{gates} gates for {model} (layers {layers}), one per KV head. Each gate reads a key before
the rotary embedding and predicts how long later queries will attend to it.

```python
{snippet.replace("NAME", details.get("name", "this folder or hub id"))}
```
{_price_table(details) if has_prices else ""}
Trained with:

```json
{json.dumps(settings, indent=1, sort_keys=True)}
```
"""


_PREDICT_SNIPPET = """\
from smartkv import GateBank

gates = GateBank.from_pretrained("NAME", model=model)
log4_lifespan = gates.predict(layer, keys)  # keys [batch, kv_heads, tokens, head_dim]"""


_LOAD = """\
from smartkv import LifespanCache, load_backbone

lm = load_backbone("BACKBONE")
model, inputs = lm.model, lm.tokenizer("Once upon a time", return_tensors="pt")
"""

_CACHE = """\
cache = LifespanCache(model, gates="NAME", footprint=FOOTPRINT)  # share of a full cache's keys
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=200)"""


def usable_footprint(prices: list[list[float]]) -> float:
    """Return a footprint to show in an example: a quarter, or the nearest one that gates have a price for.

    Args:
        prices: [footprint, price] of each footprint, as gates remember them.
    """
    footprints = [footprint for footprint, _ in prices]
    if min(footprints) <= 0.25 <= max(footprints):
        return 0.25
    return min(footprints, key=lambda footprint: abs(footprint - 0.25))


def _cache_snippet(details: dict[str, Any]) -> str:
    backbone = details.get("training", {}).get("backbone")
    load = "from smartkv import LifespanCache\n\n" if backbone is None else _LOAD.replace("BACKBONE", backbone)
    show = "" if backbone is None else "\nprint(lm.tokenizer.decode(output[0], skip_special_tokens=True))"
    return load + _CACHE.replace("FOOTPRINT", str(usable_footprint(details["prices"]))) + show


def _price_table(details: dict[str, Any]) -> str:
    rows = "\n".join(f"| {footprint:.3g} | {price:.3f} |" for footprint, price in details["prices"])
    window = details.get("training", {}).get("window")
    length = f" of {window} tokens" if window else ""
    return f"""
These prices were solved on training windows{length}. A longer text keeps a smaller share at the same price.

| footprint | price |
|---|---|
{rows}
"""
