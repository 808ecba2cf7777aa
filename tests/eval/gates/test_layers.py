"""`python -m eval layers`: figures against plain recomputation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval.__main__ import main
from smartkv import GateBank, Manifest
from smartkv.shards.labelled_keys import LabelledKeys
from tests.models import save_random_gates

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def characterised(
    tmp_path_factory: pytest.TempPathFactory, recall_shards: Path, tiny_backbone: Path
) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("layers")
    gates = save_random_gates(tiny_backbone, out / "gates")
    main(["layers", "--shards", str(recall_shards), "--out", str(out), "--gates", str(gates), "--windows", "[4, 16]"])
    return out, json.loads((out / "layers.json").read_text())["by_head"]


def test_heads_are_told_by_their_labels(characterised: Any, recall_shards: Path) -> None:
    out, found = characterised
    rows = LabelledKeys(Manifest.read(recall_shards), 0.05)
    asking, plain = [], []
    for block in rows.blocks("validation"):
        source = rows.manifest.documents[int(rows.document(block)[0])].partition("/")[0]
        (asking if source == "recall" else plain).append(rows.target(block))
    a, b = torch.cat(asking, dim=1), torch.cat(plain, dim=1)
    beyond = [
        (torch.cat([a, b], dim=1) > 2.0).double().mean(dim=1),
        (a > 2.0).double().mean(dim=1) - (b > 2.0).double().mean(dim=1),
    ]
    for name, want in zip(("hit_beyond_16", "needle"), beyond, strict=True):
        assert torch.tensor(found[name]).flatten().tolist() == pytest.approx(want.tolist(), abs=1e-6)
    gates = GateBank.from_pretrained(out / "gates")
    with torch.no_grad():
        said = torch.cat([gates(rows.keys(block).float())[..., 0] for block in rows.blocks("validation")], dim=1)
    cap = (said.quantile(0.99, dim=1) * 2).exp2()
    assert torch.tensor(found["predicted_cap"]).flatten().tolist() == pytest.approx(cap.tolist(), rel=1e-4)
    for name in ("beyond_windows", "hit_beyond_16_by_head", "needle_by_head", "predicted_cap_by_head"):
        assert (out / f"{name}.png").stat().st_size > 8_000


@pytest.mark.parametrize("windows", ["[]", "[0]", "[4000]"])
def test_windows_outside_the_follow_up_are_refused(
    windows: str, recall_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["layers", "--shards", str(recall_shards), "--out", str(tmp_path), "--windows", windows])
    assert "windows must lie between 1 and the follow-up" in capsys.readouterr().err


def test_the_config_of_layers_runs(recall_shards: Path, tmp_path: Path) -> None:
    written = yaml.safe_load((ROOT / "configs/eval/layers.yaml").read_text())
    mine = {"shards": str(recall_shards), "gates": None, "out": str(tmp_path / "out"), "windows": [4, 16, 24]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written | mine))
    main(["layers", "--config", str(tmp_path / "config.yaml")])
    assert "needle" in json.loads((tmp_path / "out/layers.json").read_text())["by_head"]
