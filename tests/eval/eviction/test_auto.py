"""`python -m eval auto` on a tiny backbone."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.__main__ import main
from smartkv.policies.named import read_policy
from tests.lightning_fixtures import ROOT, write_texts


def run(out: Path, backbone: Path, gates: Path, folder: Path, **changes: Any) -> None:
    settings = {
        "config": ROOT / "configs/eval/auto.yaml",
        "out": out,
        "backbone": backbone,
        "gates": gates,
        "dtype": "float32",
        "sources": json.dumps([{"name": "mine", "path": str(folder)}]),
        "window": 64,
        "texts": 2,
        "score_from": 16,
        "windows": "[2, 8]",
        "start": 8,
        "footprint": 0.6,
    } | changes
    main(["auto", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), splits=["train"])


def test_it_writes_a_policy_for_other_commands_with_its_price_left_open(
    tmp_path: Path, tiny_backbone: Path, random_gates: Path, texts: Path
) -> None:
    run(tmp_path, tiny_backbone, random_gates, texts)
    policy = read_policy(tmp_path / "auto.yaml", 2)
    found = json.loads((tmp_path / "auto.json").read_text())
    assert policy.name == "auto" and policy.open in ("price", None) and len(policy.by_layer(2)) == 2
    assert found["options"] == ["gated 2", "gated 8", "window 2", "window 8"]
    assert len(found["divergence"]) == len(found["footprint"]) == 2
    assert yaml.safe_load((tmp_path / "auto.yaml").read_text())["rules"] == found["policy"]["rules"]
    assert (tmp_path / "auto.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"start": 4}, "windows must be at least 1 token each and contain start, got [2, 8] and 4"),
        ({"texts": 0}, "texts must be at least 1"),
        ({"footprint": 0.01}, "cannot keep 0.01"),
    ],
)
def test_mistakes_are_told_in_a_line(
    wrong: dict[str, Any],
    said: str,
    tmp_path: Path,
    tiny_backbone: Path,
    random_gates: Path,
    texts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, tiny_backbone, random_gates, texts, **wrong)
    assert stop.value.code == 2 and said in capsys.readouterr().err.strip().splitlines()[-1]
