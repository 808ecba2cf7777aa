"""An HTML page of a text, coloured by what gates predict of each key and by when it was evicted.

The page is one file and makes no network request. It is put together from `page.html`, `page.css`, `page.js` (display)
and `page_controls.js` (input). A content security policy allows that script alone and forbids every request.
"""

import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.common.score_scale import LARGEST_CODE, LIFESPAN, ScoreScale
from smartkv.errors import SmartKVError
from smartkv.io.atomic import write_atomically
from smartkv.policies.hybrid import FOREVER, HybridPolicy, LayerRule

PARTS = Path(__file__).parent
UNDECIDED = -1  # expiry of a key that is still in its window
NO_PREDICTION = 255
FOR_GOOD, NOT_DECIDED, LARGEST_EXPIRY = 65535, 65534, 65533


def write_page(
    path: Path,
    tokens: list[str],
    predictions: Tensor,
    expiry: Tensor,
    policy: HybridPolicy,
    model: str,
    generated: list[bool] | None = None,
    scale: ScoreScale = LIFESPAN,
    budgets: list[float | None] | None = None,
) -> Path:
    """Write the page of one text.

    Args:
        path: of the HTML file.
        tokens: text of each token, in order; any characters.
        predictions: float `[layers, kv_heads, tokens]`, scores of the gates; NaN: no gates there.
        expiry: int `[layers, kv_heads, tokens]`, the first position whose query does not see the key; `FOREVER`: for
            ever; `UNDECIDED`: still in its window.
        policy: the policy that decided; its windows, price and sinks are shown.
        model: its name.
        generated: which tokens the model made; None: none.
        scale: unit and words of the scores.
        budgets: keys a KV head that each layer may hold, None where its policy alone decides; None: all of them.

    Returns:
        `path`.

    Raises:
        SmartKVError: the shapes do not fit together, there is no token, or there are more than the page can encode.
    """
    layers, kv_heads, count = predictions.shape
    generated = [False] * count if generated is None else generated
    if expiry.shape != predictions.shape or len(tokens) != count or len(generated) != count:
        raise SmartKVError(
            f"a page of {len(tokens)} tokens cannot show predictions {list(predictions.shape)}, "
            f"expiries {list(expiry.shape)} and {len(generated)} marks"
        )
    if not 0 < count < LARGEST_EXPIRY:
        raise SmartKVError(f"a page shows 1 to {LARGEST_EXPIRY - 1:,} tokens, got {count:,}")
    rules = [_rule(rule, policy) for rule in policy.by_layer(layers)]
    scale = scale.fitted(predictions, [rule["price"] for rule in rules if rule["price"] is not None])
    data = {
        "tokens": tokens,
        "generated": "".join("1" if made else "0" for made in generated),
        "layers": layers,
        "heads": kv_heads,
        "sinks": policy.sinks,
        "steps": scale.steps,
        "scale": scale.to_dict(),
        "rules": rules,
        "budgets": budgets or [None] * layers,
        "predictions": _base64(encode_predictions(predictions, scale)),
        "expiry": _base64(encode_expiry(expiry)),
    }
    script = "".join((PARTS / name).read_text(encoding="utf-8") for name in ("page.js", "page_controls.js"))
    parts = {
        "SCRIPT_HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "STYLE": (PARTS / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": script,
        "MODEL": html.escape(model),
        "POLICY": html.escape(policy.name),
        "COUNT": f"{count:,}",
        "JUDGED": html.escape(scale.judged),
        "DATA": json.dumps(data).replace("<", "\\u003c"),  # so that no token can close the element
    }
    template = (PARTS / "page.html").read_text(encoding="utf-8")
    page = re.sub(r"%%([A-Z_]+)%%", lambda match: parts[match[1]], template)
    write_atomically(path, page.encode())
    return path


def encode_predictions(predictions: Tensor, scale: ScoreScale = LIFESPAN) -> np.ndarray:
    """Encode scores as uint8, `scale.steps` a unit from `scale.low` on; NaN becomes `NO_PREDICTION`."""
    steps = ((predictions.double() - scale.low) * scale.steps).round().clamp(0, LARGEST_CODE)
    return steps.nan_to_num(NO_PREDICTION).to(torch.uint8).cpu().numpy()


def encode_expiry(expiry: Tensor) -> np.ndarray:
    """Encode expiries as little-endian uint16; `FOREVER` becomes `FOR_GOOD`, `UNDECIDED` becomes `NOT_DECIDED`."""
    codes = expiry.long().clamp(max=LARGEST_EXPIRY)
    codes = torch.where(expiry >= FOREVER, FOR_GOOD, torch.where(expiry == UNDECIDED, NOT_DECIDED, codes))
    return codes.cpu().numpy().astype("<u2")


def _rule(rule: LayerRule, policy: HybridPolicy) -> dict[str, Any]:
    price = rule.price if rule.price is not None else policy.price
    shown = rule.rule == "gated" and price is not None and math.isfinite(price)
    cap = None if policy.max_tokens is None else f"at most {policy.max_tokens:,} a {policy.max_tokens_per}"
    return {"rule": rule.rule, "window": rule.window, "price": price if shown else None, "cap": cap}


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
