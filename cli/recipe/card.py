"""The result: the gates in one folder, with a card that tells what they lose, and the licence of their model."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from cli.recipe.configs import FOOTPRINTS, Layout
from cli.recipe.settings import Options
from eval.common.results import read_result
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.gates.pretrained import CARD
from smartkv.io.atomic import write_atomically
from smartkv.io.hub import connection_error, hub_trouble, is_local
from smartkv.models.gguf import PACKAGED
from smartkv.models.named_backbones import NAMED_BACKBONES

LICENCE = re.compile(r"[a-z0-9][a-z0-9.\-]*")  # as the hub names licences


def publish(layout: Layout, options: Options, licence: str | None) -> None:
    """Copy the distilled gates to the folder of the result.

    Args:
        layout: the folder of the run.
        options: of the run.
        licence: of the model, as the user gave it; None: look it up.
    """
    gates = GateBank.from_pretrained(layout.out / "distilled" / "export")
    command = made_by(layout, options, licence)
    licence = licence or licence_of(options.backbone)
    known = {"licence": licence.lower()} if licence and LICENCE.fullmatch(licence.lower()) else {}
    unknown = "that of the model, which names none that could be read: look before you publish"
    words = f"{licence}, that of the model" if licence else unknown
    gates.details |= known | {"report": {"command": command, "licence": words}}
    save(layout, gates)


def save(layout: Layout, gates: GateBank) -> None:
    """Write the gates, in half precision as they were exported, and their card."""
    gates.half().save_pretrained(layout.gates)
    write_atomically(layout.gates / CARD, gates.card(str(layout.gates)).encode())


def made_by(layout: Layout, options: Options, licence: str | None = None) -> str:
    """Return the command that makes these gates. `licence` is what the user gave."""
    given, usual = options.to_dict(), Options(options.backbone).to_dict()
    given, usual = given | {"licence": licence}, usual | {"licence": None}
    changed = {name: value for name, value in given.items() if value != usual[name]}
    if set(changed) <= {"size"}:
        words = ["make", "gates", f"MODEL={options.backbone}", f"OUT={layout.out}"]
        return shlex.join([*words, *(f"SIZE={size}" for size in changed.values())])
    words = ["python", "-m", "cli.make_gates", "--backbone", options.backbone, "--out", str(layout.out)]
    for name, value in changed.items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def add_report(layout: Layout) -> dict[str, Any]:
    """Put the figures of the report into the gates' details and their card.

    Returns:
        The figures, see `figures`.
    """
    measured = figures(read_result(layout.result("report")))
    gates = GateBank.from_pretrained(layout.gates)
    gates.details["report"] = gates.details.get("report", {}) | measured
    save(layout, gates)
    return measured


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Return what the card shows of a comparison's result.

    Args:
        result: content of compare.json.

    Returns:
        `texts`, `recall` and `facts` as `smartkv.gates.model_card` describes them, `window` and `machine`.
    """
    rows = {name: [row for row in result["rows"] if row["contender"] == name] for name in ("gates", "window")}
    shown = [row for row in rows["gates"] if row["target"] in FOOTPRINTS]
    texts = []
    for text in result["full"]["texts"]:
        readings = [row["texts"][text] for row in rows["window"]]
        curve = [(reading["footprint"], reading["delta_nll"]) for reading in readings]
        for row in shown:
            own = row["texts"][text]
            texts.append(
                {
                    "text": text,
                    "split": result["arguments"]["texts"][text]["split"],
                    "target": row["target"],
                    "footprint": own["footprint"],
                    "delta_nll": own["delta_nll"],
                    "interval": own["interval"],
                    "windows": len(own["delta_nll_window"]),
                    "window_delta_nll": window_loss(own["footprint"], curve),
                }
            )
    recall = []
    for row in shown:
        share = row["recall"]
        beside = next((each["recall"] for each in rows["window"] if each["target"] == row["target"]), None)
        if share and share["asked"]:
            kept = {name: share[name] for name in ("footprint", "right", "asked")}
            recall.append({"target": row["target"], **kept, "window_right": beside and beside["right"]})
    whole = result["full"].get("recall") or {"asked": 0, "right": 0.0}
    return {
        "texts": texts,
        "recall": recall,
        "facts": {"asked": whole["asked"], "recalled": round(whole["asked"] * (whole["right"] or 0.0))},
        "window": result["arguments"]["window"],
        "machine": result["machine"],
    }


def window_loss(footprint: float, curve: list[tuple[float, float]]) -> float | None:
    """Return the sliding window's ΔNLL at a footprint, linear in its log between measured points.

    Args:
        footprint: what the gates kept.
        curve: measured points, footprint and ΔNLL in nats a token.

    Returns:
        Nats a token; beyond the points by at most a tenth, that of the nearest; None further away.
    """
    if not curve:
        return None
    footprints, losses = zip(*sorted(curve), strict=True)
    if not footprints[0] / 1.1 <= footprint <= footprints[-1] * 1.1:
        return None
    return float(np.interp(math.log(footprint), [math.log(point) for point in footprints], losses))


def licence_of(backbone: str) -> str | None:
    """Return the licence that a model names, such as `apache-2.0`; None: it names none that can be read here."""
    if backbone == PACKAGED or backbone in NAMED_BACKBONES:
        return "apache-2.0"
    if is_local(backbone):
        readme = Path(backbone).expanduser() / "README.md"
        try:
            return _words(ModelCard.load(readme).data.license) if readme.is_file() else None
        except (OSError, ValueError, UnicodeDecodeError):  # no front matter, or none that is YAML
            return None
    if hub_trouble() is not None:
        return None
    try:
        data = HfApi().model_info(backbone, timeout=10).card_data
        return None if data is None else _words(data.get("license"))
    except (HfHubHTTPError, OSError, connection_error()):
        return None


def _words(licence: Any) -> str | None:
    return licence if isinstance(licence, str) and licence else None


def check_licence(licence: str | None) -> None:
    """Raise SmartKVError if the licence that the user gives is empty."""
    if licence is not None and not licence.strip():
        raise SmartKVError("--licence is empty: give a name such as apache-2.0, or leave it out")
