"""Every run that configs/ describes parses, and runs at a tiny size."""

import contextlib
import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smartkv import GateBank, HybridPolicy, LayerRule, Manifest, load_backbone
from smartkv.texts.installed_code import InstalledCode
from tests.configs import CONFIGS, OBJECTIVES, files_of, load, merged, name_of, options_of, settings
from tests.lightning_fixtures import ROOT, harvest, prose, run_cli, write_texts
from tests.models import save_random_gates, save_tiny_backbone

SUBCOMMANDS = {
    "Harvest": "predict",
    "LifespanGates": "fit",
    "OnlineKeys": "online",
    "DistilledGates": "distil",
    "EvictionTuning": "tune",
}
SHORT = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1")
FOLDER_KEYS = ("out", "default_root_dir", "save_dir", "dirpath")
FOLDERS = {"harvest", "gates", "lifespans", "distilled", "eviction_tuning", "recipe"}  # in configs/, of main.py


def runs(subcommand: str) -> list[Any]:
    """The configs of one kind of run as test parameters; overlays stand for themselves on top of their base.

    Args:
        subcommand: `predict`, or a kind of `fit`: `fit` (gates on shards), `online` (gates without shards), `distil`
            (gates through the frozen model) or `tune` (adapters).
    """
    chosen = []
    for path in CONFIGS:
        parts = [merged(path).get(part) for part in ("model", "data")]
        if path in OBJECTIVES or not all(isinstance(part, dict) for part in parts):
            continue  # the latter are configs of `python -m eval`
        model, data = (part["class_path"] for part in parts)
        if SUBCOMMANDS.get("OnlineKeys" if data == "OnlineKeys" else model) == subcommand:
            chosen.append(path)
    return [pytest.param(path, id=name_of(path)) for path in chosen]


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for SMARTKV_DATA with a little of every source that the configs name."""
    folder = tmp_path_factory.mktemp("data")
    write_texts(folder / "books", splits=["train", "validation", "test"])
    records = {
        "gsm8k/train.jsonl": [{"question": prose(80, i), "answer": "4"} for i in range(40)],
        "gsm8k/test.jsonl": [{"question": prose(80, i), "answer": "4"} for i in range(40)],
        "math/math500.jsonl": [{"unique_id": str(i), "problem": prose(80, i), "solution": "4"} for i in range(40)],
        "math/aime24.jsonl": [{"id": i, "problem": prose(80, i), "solution": "4"} for i in range(40)],
    }
    for name, lines in records.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for SMARTKV_DATA with a little of every kind of text of the default mix."""
    folder = tmp_path_factory.mktemp("kinds")
    for name in ("books/train", "books/validation", "books/test", "webtext", "gsm8k", "math"):
        (folder / name).mkdir(parents=True)
        if name.startswith("books"):  # chats are drawn from paragraphs of sentences
            words = iter(prose(12000, 5).split())
            sentences = [f"The {' '.join(islice(words, 11))}." for _ in range(150)]
            book = "\n\n".join(" ".join(sentences[at : at + 6]) for at in range(0, 150, 6))
            (folder / name / "book.txt").write_text(book)
    solution = "She has 3 + 4 = <<3+4=7>>7.\nThen 7 * 2 = <<7*2=14>>14.\n#### 14"
    records = {
        "webtext/c4_sample.jsonl": [{"id": str(i), "text": prose(600, i)} for i in range(40)],
        "webtext/fineweb_edu.jsonl": [{"id": str(i), "text": prose(600, i)} for i in range(40)],
        "gsm8k/train.jsonl": [{"question": prose(80, i), "answer": solution} for i in range(200)],
        "gsm8k/test.jsonl": [{"question": prose(80, i), "answer": solution} for i in range(40)],
        "math/math500.jsonl": [{"unique_id": str(i), "problem": prose(80, i), "solution": "4"} for i in range(200)],
    }
    for name, lines in records.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    article = "".join(f" = Title {i} = \n \n {prose(900, i)} \n \n" for i in range(20))
    for name in ("wikitext-2.valid.txt", "wikitext-2-raw.test.txt"):
        (folder / "webtext" / name).write_text(article)
    return folder


def reads_all_kinds(path: Path) -> bool:
    """Whether a config reads the default mix of `make gates`."""
    return any(source["name"] == "recall_code" for source in merged(path)["data"]["init_args"]["sources"])


def find_little_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the source `code` find a few small modules: a byte tokenizer is slow."""
    few = {name: files for name, files in InstalledCode.find().files.items() if name < "d" and len(files) < 4}
    monkeypatch.setattr(InstalledCode, "find", lambda: InstalledCode(few))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    return harvest(folder / "shards", tiny_backbone, write_texts(folder / "texts"), model={"post_rope": True})


# -- they parse -------------------------------------------------------------------------------------------------------


def test_every_config_of_main_is_tested() -> None:
    tested = {param.values[0] for subcommand in SUBCOMMANDS.values() for param in runs(subcommand)}
    folders = [path for path in CONFIGS if path.parent.name in FOLDERS and path.stem != "report"]  # one of eval's
    demo = [ROOT / "configs" / "demo" / f"{name}.yaml" for name in ("harvest", "gates")]
    assert folders and tested == {*folders, *demo}


def printed_config(*args: str | Path) -> dict[str, Any]:
    """Return what `--print_config` prints; it must exit with status 0."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        run_cli(*args, "--print_config")
    assert stop.value.code == 0
    return yaml.safe_load(printed.getvalue())


@pytest.mark.parametrize("path", runs("predict"))
def test_a_harvest_config_prints_what_it_sets(path: Path) -> None:
    printed, written = printed_config("predict", "-c", path), load(path)
    for part in ("model", "data"):
        assert only(printed[part], written[part]) == written[part]


@pytest.mark.parametrize("path", runs("fit") + runs("online") + runs("distil") + runs("tune"))
def test_a_gates_config_prints_what_it_sets(path: Path) -> None:
    printed, written = printed_config("fit", *options_of(path)), merged(path)
    for part in ("trainer", "model", "data"):
        assert only(printed[part], written[part]) == written[part]


def only(printed: Any, written: Any) -> Any:
    """Return `printed`, cut down to what the file writes."""
    if isinstance(written, dict):
        return {key: only(printed[key], value) for key, value in written.items()}
    if isinstance(written, list):
        return [only(there, here) for there, here in zip(printed, written, strict=True)]
    return printed.rpartition(".")[2] if isinstance(printed, str) and printed.endswith(f".{written}") else printed


# -- they run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", runs("predict"))
def test_a_harvest_config_runs(
    path: Path, tiny_backbone: Path, tiny_data: Path, all_kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the configs write below runs/
    monkeypatch.setenv("SMARTKV_DATA", str(tiny_data))
    window, not_files = 256, set[str]()
    if reads_all_kinds(path):  # facts in chats need room
        monkeypatch.setenv("SMARTKV_DATA", str(all_kinds))
        find_little_code(monkeypatch)
        window, not_files = 512, {"installed", "drawn"}
    small = {"data.init_args.window": window, "data.init_args.windows": '{"train": 2, "validation": 1, "test": 0}',
             "model.init_args.follow_up": 32, "model.init_args.ages": "[8]", "model.init_args.threads": 1,
             "model.init_args.backbone": tiny_backbone, "data.init_args.backbone": tiny_backbone}  # fmt: skip
    overrides = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    run_cli("predict", "-c", path, *overrides, "--trainer.accelerator", "cpu")
    manifest = Manifest.read(tmp_path / load(path)["out"])
    assert {split: sum(s.windows for s in manifest.of_split(split)) for split in ("train", "validation")} == {
        "train": 2,
        "validation": 1,
    }
    assert {source["origin"] for source in manifest.sources} - not_files == {"local"}


@pytest.mark.parametrize("path", runs("fit"))
def test_a_gates_config_runs(path: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callback = next(
        (c for c in merged(path)["trainer"]["callbacks"] if c["class_path"] == "HybridCachePerplexity"), None
    )
    small, wanted = {}, set[str]()
    if callback is not None:
        small = {"footprints": "[0.5]", "windows": "1", "dtype": "float32"}  # what so short windows can keep
        policy = callback["init_args"]["policy"]
        named = policy if isinstance(policy, list) else [policy]
        wanted = {f"val_delta_nll/{name}_0.5" for name in ["window", *named]}
    small = {f"trainer.callbacks.HybridCachePerplexity.{name}": value for name, value in small.items()}
    overrides = [part for name, value in small.items() for part in (f"--{name}", value)]
    overrides += ["--data.init_args.shards", shards, *SHORT, "--trainer.accelerator", "cpu"]
    run_cli("fit", *options_of(path), *overrides)
    out = tmp_path / merged(path)["out"]
    assert len(GateBank.from_pretrained(out / "export")) == 4
    logs = [EventAccumulator(str(file)).Reload() for file in out.rglob("events.*")]
    assert {tag for log in logs for tag in log.Tags()["scalars"] if tag.startswith("val_delta_nll/")} == wanted


@pytest.mark.parametrize("path", runs("online"))
def test_an_online_config_runs(
    path: Path, tiny_backbone: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMARTKV_DATA", str(tiny_data))
    small = {"window": 256, "windows": '{"train": 2, "validation": 1, "test": 0}', "follow_up": 32, "threads": 1,
             "backbone": tiny_backbone}  # fmt: skip
    overrides = [part for name, value in small.items() for part in (f"--data.init_args.{name}", str(value))]
    run_cli("fit", *options_of(path), *overrides, "--trainer.accelerator", "cpu", *SHORT)
    assert len(GateBank.from_pretrained(tmp_path / merged(path)["out"] / "export")) == 4


@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda path: path.stem)
def test_an_objective_s_overlay_runs_and_changes_the_objective_alone(
    path: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed, plain = (printed_config("fit", *options_of(file)) for file in (path, files_of(path)[0]))
    assert printed["data"] == plain["data"]
    changed = {key for key, value in printed["model"]["init_args"].items() if value != plain["model"]["init_args"][key]}
    assert changed == {"objective"} and printed["trainer"]["max_epochs"] == plain["trainer"]["max_epochs"]
    small = {"data.init_args.shards": shards, "trainer.accelerator": "cpu"}
    if path.stem == "future-attention":
        small["model.init_args.objective.init_args.ages"] = "[8]"  # what the test's shards hold
    run_cli("fit", *options_of(path), *SHORT, *(part for name, value in small.items() for part in (f"--{name}", value)))
    assert GateBank.from_pretrained(tmp_path / merged(path)["out"] / "export").details["training"]


@pytest.mark.parametrize("path", runs("distil"))
def test_a_distillation_config_runs_on_a_tiny_model_of_its_family(
    path: Path, all_kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    family = next((name for name in ("qwen2", "qwen3") if path.name.startswith(name)), "llama")
    tiny_backbone = save_tiny_backbone(tmp_path / "backbone", family, max_positions=512)
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path / "data"))
    for split in ("train", "validation", "test"):
        (tmp_path / "data" / "books" / split).mkdir(parents=True)
        (tmp_path / "data" / "books" / split / f"{split}.txt").write_text(prose(8000, len(split)))
    if reads_all_kinds(path):
        monkeypatch.setenv("SMARTKV_DATA", str(all_kinds))
        find_little_code(monkeypatch)
    written = merged(path)["model"]["init_args"]
    save_random_gates(tiny_backbone, tmp_path / written["gates"])
    small = {"data.init_args.window": 512, "data.init_args.windows": '{"train": 4, "validation": 1, "test": 0}',
             "data.init_args.backbone": tiny_backbone, "model.init_args.backbone": tiny_backbone,
             "model.init_args.threads": 1, "trainer.accelerator": "cpu", "trainer.val_check_interval": 1}  # fmt: skip
    options = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    run_cli("fit", *options_of(path), *options, *SHORT)
    gates = GateBank.from_pretrained(tmp_path / merged(path)["out"] / "export")
    assert len(gates) == 4 and gates.details["target"] == "log worth"


@pytest.mark.parametrize("path", runs("tune"))
def test_a_tuning_config_runs_on_a_tiny_model_of_its_family(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    family = next((name for name in ("qwen2", "qwen3") if path.name.startswith(name)), "llama")
    tiny_backbone = save_tiny_backbone(tmp_path / "backbone", family, max_positions=512)
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path / "data"))
    for split in ("train", "validation", "test"):
        (tmp_path / "data" / "books" / split).mkdir(parents=True)
        (tmp_path / "data" / "books" / split / f"{split}.txt").write_text(prose(4000, len(split)))
    (tmp_path / "data" / "webtext").mkdir()
    pages = [{"id": str(number), "text": prose(600, number)} for number in range(40)]
    for name in ("c4_sample", "fineweb_edu"):
        (tmp_path / "data" / "webtext" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pages)))
    small = {"data.init_args.window": 128, "data.init_args.windows": '{"train": 4, "validation": 2, "test": 0}',
             "data.init_args.backbone": tiny_backbone, "model.init_args.backbone": tiny_backbone,
             "model.init_args.threads": 1, "model.init_args.dtype": "float32", "trainer.accelerator": "cpu",
             "trainer.max_steps": 2, "trainer.accumulate_grad_batches": 1, "trainer.val_check_interval": 2}  # fmt: skip
    if merged(path)["model"]["init_args"]["dropping"]["class_path"] == "GateDropping":
        policy = HybridPolicy((LayerRule("all", "gated", 8),))
        details = {"ages": [8, 24], "policy": policy.to_dict(), "prices": [[0.1, 0.0], [0.9, 0.0]]}
        fingerprint = load_backbone(str(tiny_backbone)).fingerprint
        GateBank(fingerprint, None, 16, 2, details).save_pretrained(tmp_path / "gates")
        small["model.init_args.dropping.init_args.gates"] = tmp_path / "gates"
    run_cli("fit", *options_of(path), *(part for name, value in small.items() for part in (f"--{name}", str(value))))
    assert (tmp_path / merged(path)["out"] / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:.*no last checkpoint", "ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_demo_s_fit_starts_without_a_checkpoint_and_goes_on_from_its_last(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, last = ROOT / "configs/demo/gates.yaml", tmp_path / "runs/demo/gates/checkpoints/last.ckpt"
    steps = []
    for epochs in (1, 2):
        overrides = ["--data.init_args.shards", shards, "--trainer.accelerator", "cpu", "--trainer.max_epochs", epochs]
        run_cli("fit", "-c", config, "--ckpt_path", "last", *map(str, overrides))
        steps.append(torch.load(last, weights_only=True)["global_step"])
    assert steps[1] == 2 * steps[0] > 0


# -- they fit together ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", runs("predict"))
def test_a_harvest_config_names_one_backbone(path: Path) -> None:
    config = merged(path)
    assert config["model"]["init_args"]["backbone"] == config["data"]["init_args"]["backbone"]


@pytest.mark.parametrize("path", runs("distil"))
def test_a_distillation_config_starts_from_what_a_gates_config_exports_or_what_comes_with_smartkv(path: Path) -> None:
    exports = [f"{merged(param.values[0])['out']}/export" for param in runs("fit")]
    gates = merged(path)["model"]["init_args"]["gates"]
    assert exports.count(gates) == 1 or (ROOT / "smartkv/pretrained" / gates).is_dir()


@pytest.mark.parametrize("path", runs("fit"))
def test_a_gates_config_reads_what_a_harvest_config_writes(path: Path) -> None:
    data = merged(path)["data"]["init_args"]
    harvests = [merged(param.values[0]) for param in runs("predict")]
    made = [config for config in harvests if config["out"] == data["shards"]]
    assert len(made) == 1
    labels = made[0]["model"]["init_args"]
    assert data["threshold"] in labels["thresholds"]
    assert data["inputs"] == "keys" or labels["post_rope"]


@pytest.mark.parametrize("path", [param for name in SUBCOMMANDS.values() for param in runs(name)])
def test_a_run_names_one_folder_below_runs_and_no_other_for_what_it_writes(path: Path) -> None:
    folders = [value for name, value in settings(merged(path)) if name in FOLDER_KEYS]
    assert len(folders) == 1 and folders[0].startswith("runs/")


def test_no_two_runs_have_the_same_folder() -> None:
    folders = [merged(param.values[0])["out"] for name in SUBCOMMANDS.values() for param in runs(name)]
    folders += [merged(path)["out"] for path in OBJECTIVES]
    assert len(set(folders)) == len(folders) > 20


@pytest.mark.parametrize("path", runs("fit"))
def test_the_best_gates_are_kept_stopped_and_exported_by_one_figure(path: Path) -> None:
    monitors = [value for name, value in settings(merged(path)) if name == "monitor"]
    assert monitors == ["val_r2_mean"] * 3  # of ModelCheckpoint, EarlyStopping and GateExport
