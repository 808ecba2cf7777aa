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
    snippet = _CACHE_SNIPPET if has_prices else _PREDICT_SNIPPET
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


_CACHE_SNIPPET = """\
from smartkv import LifespanCache

cache = LifespanCache(model, gates="NAME", footprint=0.25)  # a quarter of a full cache's keys
model.generate(**inputs, past_key_values=cache)"""


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
