"""Every command of README and docs runs at a tiny size: its own options first, then those that make it small."""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.__main__ import main as eval_main
from smartkv import GateBank, HybridPolicy, LayerRule, load_backbone
from tests.lightning_fixtures import harvest, prose, run_cli
from tests.markdown import PAGES, ROOT
from tests.models import save_tiny_backbone
from tests.test_docs import ALL as COMMANDS
from tests.test_docs import project_arguments

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SECONDS = "too long even at a tiny size: its own tests run it"
ELSEWHERE = "tests/eval/tasks/test_suite.py runs its config"
NOT_RUN = {"speed": SECONDS, "training": SECONDS, "decode": SECONDS} | dict.fromkeys(
    ("longbench", "reasoning", "code_completion"), ELSEWHERE
)
KVPRESS = "configs/eval/presses.yaml"  # in an environment of its own


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny backbone, gates with a policy and prices, shards and texts, for every command."""
    folder = tmp_path_factory.mktemp("docs")
    backbone = save_tiny_backbone(folder / "backbone", max_positions=4096)
    tokenizer = json.loads((backbone / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (backbone / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    details = {
        "ages": [8, 24],
        "policy": HybridPolicy((LayerRule("all", "gated", 8),)).to_dict(),
        "prices": [[0.04, 9.0], [0.1, 0.1], [0.9, -9.0]],
    }
    GateBank(load_backbone(str(backbone), "float32").fingerprint, None, 16, 2, details).save_pretrained(
        folder / "gates"
    )
    GateBank(load_backbone(str(backbone), "float32").fingerprint).save_pretrained(folder / "lifespan_gates")
    for split in ("train", "validation", "test"):
        (folder / "texts" / split).mkdir(parents=True)
        for number in range(3):
            (folder / "texts" / split / f"{split}{number}.txt").write_text(prose(6000, number + len(split)))
    shards = harvest(folder / "shards", backbone, folder / "texts", model={"post_rope": True, "ages": [8]})
    return {"backbone": backbone, "gates": folder / "gates", "shards": shards, "texts": folder / "texts",
            "lifespan_gates": folder / "lifespan_gates"}  # fmt: skip


def small(command: str, work: dict[str, Path], out: Path) -> dict[str, Any]:
    """The options that make one command of `python -m eval` tiny."""
    mine = [{"name": "mine", "path": str(work["texts"])}]
    model = {"backbone": work["backbone"], "dtype": "float32", "out": out}
    tasks = {**model, "gates": work["gates"], "footprints": [0.5], "contenders": ["gates", "window"],
             "calibration": {"sources": mine, "windows": 1}, "haystack": mine}  # fmt: skip
    table: dict[str, dict[str, Any]] = {
        "anchors": {**model, "sources": mine, "window": 512, "windows": 1},
        "auto": {
            **model,
            "gates": work["gates"],
            "sources": mine,
            "window": 128,
            "texts": 1,
            "score_from": 32,
            "windows": [4, 8],
            "start": 8,
        },
        "baselines": {"model": work["backbone"], "tokens": 128, "num_prompts": 1, "sources": mine, "out": out},
        "calibrate": {**model, "sources": mine, "window": 64, "windows": 1, "follow_up": 16},
        "compare": {
            **model,
            "gates": work["gates"],
            "footprints": [0.5],
            "others": None,
            "window": 128,
            "score_from": 64,
            "texts": [{"name": "books", "split": "test", "windows": 1, "sources": mine}],
            "prefill": 64,
            "recall": {"trials": 0},
            "haystack": mine,
            "calibration": mine,
            "calibration_windows": 1,
        },
        "budgets": {
            **model,
            "gates": work["gates"],
            "lengths": [128],
            "footprints": [0.5],
            "texts": [{"name": "books", "split": "test", "windows": 1, "sources": mine}],
        },
        "gates": {"gates": work["lifespan_gates"], "shards": work["shards"], "out": out},
        "generate": {
            **model,
            "gates": work["gates"],
            "sources": mine,
            "calibration_window": 64,
            "max_new_tokens": 4,
            "prompt": "Once",
            "prompt_file": None,
            "footprint": 0.5,
        },
        "kinds": {
            **model,
            "gates": [str(work["gates"])],
            "footprints": [0.5],
            "window": 128,
            "score_from": 64,
            "texts": [{"name": "books", "split": "test", "windows": 1, "sources": mine}],
        },
        "layers": {"shards": work["shards"], "gates": work["lifespan_gates"], "out": out, "windows": [8, 16]},
        "longbench": {k: v for k, v in tasks.items() if k != "haystack"},
        "lookup": {
            **model,
            "gates": work["gates"],
            "texts": [{"name": "books", "split": "test", "windows": 1, "sources": mine}],
            "context": 64,
            "new_tokens": 4,
            "footprints": [0.5],
        },
        "needle": {**tasks, "lengths": [512], "depths": 1, "samples": 1, "new_tokens": 2},
        "perplexity": {
            **model,
            "gates": work["lifespan_gates"],
            "sources": mine,
            "window": 128,
            "windows": 1,
            "score_from": 64,
            "calibration_windows": 1,
            "footprints": [0.5],
        },
        "reasoning": {k: v for k, v in tasks.items() if k != "haystack"},
        "ruler": {**tasks, "lengths": [2400], "samples": 1, "families": ["niah_single_2"]},
    }
    return table[command]


def run_eval(arguments: list[str], changes: dict[str, Any]) -> None:
    """The command as it is written, then what makes it small: of an option that is given twice the last counts."""
    written = {name: value if isinstance(value, str | Path) else json.dumps(value) for name, value in changes.items()}
    eval_main([*arguments, *(part for name, value in written.items() for part in (f"--{name}", str(value)))])


def commands(program: str) -> list[Any]:
    """Commands of main.py or of `python -m eval`, each once; a bare name in a sentence is none."""
    found = {project_arguments(command): command for command in COMMANDS}
    chosen = {words: command for words, command in found.items() if words[:1] == (program,) and len(words) > 2}
    return [pytest.param(list(words[1:]), id=str(command)) for words, command in chosen.items()]


def without_adapter(arguments: list[str]) -> list[str]:
    """The command for the model as it is: an adapter that a page names was trained for another."""
    if "--adapter" not in arguments:
        return arguments
    place = arguments.index("--adapter")
    return arguments[:place] + arguments[place + 2 :]


@pytest.mark.parametrize("arguments", commands("eval"))
def test_a_measurement_runs(arguments: list[str], work: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    command, out = arguments[0], tmp_path / "out"
    if command in NOT_RUN or KVPRESS in arguments:
        pytest.skip(NOT_RUN.get(command, "kvpress has an environment of its own"))
    if command == "figures":
        run_eval(arguments, {"out": out})
    elif command == "gains":
        for name in ("base", "trained"):
            run_eval(["compare"], small("compare", work, out / name) | {"contenders": ["gates", "window"]})
        run_eval(arguments, {"base": out / "base", "trained": [str(out / "trained")], "out": out})
    elif command == "objectives":
        run_eval(["gates"], small("gates", work, out / "scores"))
        run_eval(arguments, {"runs": {"mine": str(out)}, "out": out})
    else:
        changes = small(command, work, out)
        if "configs/eval/policies.yaml" in arguments:
            changes["contenders"] = ["gates", "window"]  # one of its policies is written by `eval auto`
        run_eval(without_adapter(arguments), changes)
    assert any(out.rglob("*.json" if command != "figures" else "*.png"))


SCRIPTS = {command.words: command for command in COMMANDS if command.words[1:2] and "export_heads" in command.words[1]}


@pytest.mark.parametrize("words", [pytest.param(words, id=str(command)) for words, command in SCRIPTS.items()])
def test_a_script_runs(words: tuple[str, ...], work: dict[str, Path], tmp_path: Path) -> None:
    what = words[2]
    source = {"shards": work["shards"], "gates": work["lifespan_gates"]}[what]
    done = subprocess.run([sys.executable, words[1], what, str(source), str(tmp_path / "heads")], cwd=ROOT)
    assert done.returncode == 0 and any((tmp_path / "heads").rglob("*.safetensors"))


TINY = {"window": 256, "windows": '{"train": 4, "validation": 2, "test": 0}', "threads": 1, "follow_up": 32}


def settings(arguments: list[str]) -> dict[str, Any]:
    """All settings of a command of main.py, configs merged."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        run_cli(*arguments, "--print_config")
    return yaml.safe_load(printed.getvalue())


@pytest.mark.parametrize("arguments", [param for param in commands("main.py") if param.values[0][0] == "predict"])
def test_a_harvest_runs(
    arguments: list[str], work: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    mine = json.dumps([{"name": "mine", "path": str(work["texts"])}])
    changes = {"model.init_args.backbone": work["backbone"], "data.init_args.backbone": work["backbone"],
               "model.init_args.follow_up": 32, "model.init_args.ages": "[8]", "model.init_args.threads": 1,
               "data.init_args.window": 256, "data.init_args.windows": TINY["windows"], "data.init_args.sources": mine,
               "out": tmp_path / "shards",
               "trainer.devices": 1, "trainer.num_nodes": 1, "trainer.accelerator": "cpu"}  # fmt: skip
    run_cli(*arguments, *(part for name, value in changes.items() for part in (f"--{name}", str(value))))
    assert (tmp_path / "shards/manifest.json").is_file()


@pytest.fixture
def inputs(work: dict[str, Path]) -> Callable[[str], dict[str, Any]]:
    """What the datamodule of a fit is given in place of its own."""
    mine = json.dumps([{"name": "mine", "path": str(work["texts"])}])
    texts = {"backbone": work["backbone"], "sources": mine, "window": 256, "windows": TINY["windows"]}

    def inputs(datamodule: str) -> dict[str, Any]:
        if datamodule.endswith("LifespanShards"):
            return {"shards": work["shards"]}
        return texts | ({"follow_up": 32, "threads": 1} if datamodule.endswith("OnlineKeys") else {})

    return inputs


@pytest.mark.parametrize("arguments", [param for param in commands("main.py") if param.values[0][0] == "fit"])
def test_a_fit_runs(
    arguments: list[str],
    work: dict[str, Path],
    inputs: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    merged = settings(arguments)
    model, data = merged["model"]["class_path"].rpartition(".")[2], merged["data"]["class_path"]
    changes = {f"data.init_args.{name}": value for name, value in inputs(data).items()}
    tuning = {"trainer.max_steps": 1, "trainer.accumulate_grad_batches": 1, "trainer.val_check_interval": 1}
    changes |= tuning if model == "EvictionTuning" else {"trainer.fast_dev_run": "true"}
    changes |= { "trainer.accelerator": "cpu", "trainer.devices": 1,
                "trainer.num_nodes": 1, "ckpt_path": "null"}  # fmt: skip
    if model != "LifespanGates":
        changes |= {"model.init_args.backbone": work["backbone"], "model.init_args.threads": 1}
    if model == "DistilledGates":
        hidden = merged["model"]["init_args"]["hidden"]
        GateBank(load_backbone(str(work["backbone"]), "float32").fingerprint, None, hidden).save_pretrained(
            tmp_path / "g"
        )
        changes["model.init_args.gates"] = tmp_path / "g"
    elif model == "EvictionTuning" and "GateDropping" in merged["model"]["init_args"]["dropping"]["class_path"]:
        changes["model.init_args.dropping.init_args.gates"] = work["gates"]
    elif "FutureAttention" in str(merged["model"]["init_args"].get("objective", "")):
        changes["model.init_args.objective.init_args.ages"] = "[8]"
    paths = [str(ROOT / word) if word.startswith("configs/") else word for word in arguments]
    monkeypatch.chdir(tmp_path)  # the configs write below runs/
    run_cli(*paths, *(part for name, value in changes.items() for part in (f"--{name}", str(value))))
    if model == "EvictionTuning":
        assert any((tmp_path / "runs").rglob("*.safetensors"))
    else:
        assert not (tmp_path / "runs").exists()  # of a fast_dev_run


def test_pages_have_commands() -> None:
    assert len(PAGES) > 10 and len(COMMANDS) > 40
