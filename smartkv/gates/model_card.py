"""The model card (README.md) of exported gates."""

import json
from typing import Any


def model_card(gates: int, model: str, layers: str, details: dict[str, Any]) -> str:
    """The model card, Markdown.

    Args:
        gates: how many.
        model: in words.
        layers: that have gates, in words.
        details: of the gates.
    """
    use = _USE_POLICY if (remembered := bool(details.get("policy") and details.get("prices"))) else _USE_GATES
    settings = {name: value for name, value in details.items() if name != "prices"}
    return f"""---
library_name: smartkv
tags: [kv-cache, key-eviction]
---

# SmartKV gates

{gates} gates for {model} (layers {layers}). Each reads a key before the
rotary embedding and predicts how long later queries will look at it.

```python
{use.replace("NAME", details.get("name", "this folder or hub id"))}
```
{_prices(details) if remembered else ""}
Trained with:

```json
{json.dumps(settings, indent=1, sort_keys=True)}
```
"""


_USE_GATES = """\
from smartkv import GateBank
gates = GateBank.from_pretrained("NAME", model=model)
log4_lifespan = gates.predict(layer, keys)  # keys [batch, kv_heads, tokens, head_dim]"""


_USE_POLICY = """\
from smartkv import GateBank, LifespanCache, policy_of
gates = GateBank.from_pretrained("NAME", model=model)
cache = LifespanCache(model, gates, policy_of(gates, 0.25))  # share of a full cache's keys
model.generate(**inputs, past_key_values=cache)"""


def _prices(details: dict[str, Any]) -> str:
    rows = "\n".join(f"| {footprint:.3g} | {price:.3f} |" for footprint, price in details["prices"])
    window = details.get("training", {}).get("window")
    length = f" of {window} tokens" if window else ""
    return f"""
Prices, solved on training windows{length}; a longer text keeps a smaller share at the same price:

| footprint | price |
|---|---|
{rows}
"""
