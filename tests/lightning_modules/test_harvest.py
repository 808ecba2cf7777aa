"""Harvest: shards by contract, and the same bytes however they were made."""

import hashlib
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from smartkv import LabelSpec, label_window, load_backbone
from smartkv.io.locks import LOCK
from smartkv.shards.manifest import MANIFEST, SPLITS, Manifest
from smartkv.texts.windows import PLAN
from tests.lightning_fixtures import (
    FOLLOW_UP,
    SINKS,
    TORCHRUN,
    WINDOW,
    harvest,
    harvest_by_trainer,
    harvest_config,
    run_command,
    shard_bytes,
    write_config,
)

ONE = {"train": 1, "validation": 0}
WINDOWS = {"train-00000": 2, "train-00001": 2, "train-00002": 2, "train-00003": 1,
           "validation-00000": 2, "validation-00001": 1}  # fmt: skip


def shards_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.stem: load_file(path) for path in sorted(folder.glob("*-*.safetensors"))}


# -- what a harvest leaves --------------------------------------------------------------------------------------------


def test_the_folder_holds_the_plan_the_shards_the_manifest_and_its_lock_and_nothing_else(tiny_shards: Path) -> None:
    shards = {f"{name}.safetensors" for name in WINDOWS}
    assert {path.name for path in tiny_shards.iterdir()} == {PLAN, MANIFEST, LOCK} | shards


def test_shards_keep_their_contract_of_names_dtypes_and_shapes(tiny_shards: Path) -> None:
    for name, shard in shards_of(tiny_shards).items():
        tokens = WINDOWS[name] * WINDOW
        assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in shard.items()} == {
            "keys": (torch.float16, (2, 2, tokens, 8)),
            "lifespan": (torch.int32, (2, 2, 2, tokens)),
            "future_attention": (torch.float32, (1, 2, 2, tokens)),
            "horizon": (torch.int32, (tokens,)),
            "position": (torch.int32, (tokens,)),
            "token": (torch.int32, (tokens,)),
            "document": (torch.int32, (tokens,)),
            "split": (torch.int32, (tokens,)),
        }


def test_keys_are_finite_and_not_all_alike(tiny_shards: Path) -> None:
    for shard in shards_of(tiny_shards).values():
        assert torch.isfinite(shard["keys"]).all()
        assert shard["keys"].std(dim=2).min() > 0


def test_lifespans_lie_between_one_and_what_the_window_held(tiny_shards: Path) -> None:
    for shard in shards_of(tiny_shards).values():
        assert shard["lifespan"].min() >= 1
        assert (shard["lifespan"] <= shard["horizon"] + 1).all()


def test_labels_in_the_shard_are_those_of_label_window_on_the_same_tokens(
    tiny_shards: Path, tiny_backbone: Path
) -> None:
    model = load_backbone(str(tiny_backbone), "float32").model
    spec = LabelSpec((0.02, 0.05), (8,), FOLLOW_UP)
    for shard in shards_of(tiny_shards).values():
        for window, tokens in enumerate(shard["token"].split(WINDOW)):
            here = slice(window * WINDOW, (window + 1) * WINDOW)
            labels = label_window(model, tokens, spec)
            assert torch.equal(shard["keys"][:, :, here], labels.keys)
            assert torch.equal(shard["lifespan"][..., here], labels.lifespan)
            assert torch.equal(shard["horizon"][here], labels.horizon)
            torch.testing.assert_close(
                shard["future_attention"][..., here], labels.future_attention, rtol=0, atol=0, equal_nan=True
            )


def test_shards_hold_the_planned_tokens_and_documents(tiny_shards: Path) -> None:
    plan, shards = load_file(tiny_shards / PLAN), shards_of(tiny_shards)
    for name in ("token", "document"):
        held = torch.cat([shard[name] for shard in shards.values()])
        assert torch.equal(held, plan["tokens" if name == "token" else name].flatten())


def test_position_counts_from_the_start_of_each_window(tiny_shards: Path) -> None:
    for name, shard in shards_of(tiny_shards).items():
        assert shard["position"].tolist() == list(range(WINDOW)) * WINDOWS[name]


def test_split_is_that_of_the_shard_s_name(tiny_shards: Path) -> None:
    for name, shard in shards_of(tiny_shards).items():
        assert set(shard["split"].tolist()) == {SPLITS.index(name.partition("-")[0])}


def test_the_header_names_model_thresholds_and_window(tiny_shards: Path, tiny_backbone: Path) -> None:
    with safe_open(tiny_shards / "train-00000.safetensors", "pt") as file:
        header = json.loads(file.metadata()["smartkv"])
    fingerprint = load_backbone(str(tiny_backbone), "float32").fingerprint
    assert header["fingerprint"] == vars(fingerprint)
    assert (header["thresholds"], header["window"], header["follow_up"]) == ([0.02, 0.05], WINDOW, FOLLOW_UP)


def test_the_manifest_counts_windows_tokens_and_bytes_of_each_shard(tiny_shards: Path) -> None:
    entries = {entry.file.removesuffix(".safetensors"): entry for entry in Manifest.read(tiny_shards).shards}
    assert {name: entry.windows for name, entry in entries.items()} == WINDOWS
    for name, entry in entries.items():
        content = (tiny_shards / entry.file).read_bytes()
        assert entry.tokens == WINDOWS[name] * WINDOW
        assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_the_manifest_says_where_the_texts_came_from(tiny_shards: Path) -> None:
    assert Manifest.read(tiny_shards).sources == [
        {"name": "mine", "origin": "local", "windows": {"train": 7, "validation": 3, "test": 0}}
    ]


def test_the_manifest_records_the_arguments_of_the_run(tiny_shards: Path, tiny_backbone: Path) -> None:
    manifest = Manifest.read(tiny_shards)
    recorded = {name: manifest.arguments[name] for name in ("backbone", "dtype", "window", "seed")}
    assert recorded == {"backbone": str(tiny_backbone), "dtype": "float32", "window": WINDOW, "seed": 0}
    assert manifest.sinks == SINKS and set(manifest.arguments["versions"]) == {"torch", "transformers"}


def test_keys_after_the_rotary_embedding_are_recorded_on_request(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path
) -> None:
    out = harvest_by_trainer(tmp_path / "out", tiny_backbone, tiny_texts, windows=ONE, model={"post_rope": True})
    shard = load_file(out / "train-00000.safetensors")
    before, after = shard["keys"], shard["keys_post_rope"]
    assert after.dtype == torch.float16 and after.shape == before.shape
    torch.testing.assert_close(after[:, :, 0], before[:, :, 0])  # position 0 is not rotated
    assert not torch.allclose(after[:, :, 1:], before[:, :, 1:], atol=1e-2)
    torch.testing.assert_close(after.float().norm(dim=-1), before.float().norm(dim=-1), rtol=2e-3, atol=2e-3)


def test_future_attention_is_left_out_without_ages(tmp_path: Path, tiny_backbone: Path, tiny_texts: Path) -> None:
    out = harvest_by_trainer(tmp_path / "out", tiny_backbone, tiny_texts, windows=ONE, model={"ages": []})
    assert "future_attention" not in load_file(out / "train-00000.safetensors")


# -- the same bytes ---------------------------------------------------------------------------------------------------


def test_a_second_harvest_gives_the_same_bytes(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path
) -> None:
    assert shard_bytes(harvest_by_trainer(tmp_path / "second", tiny_backbone, tiny_texts)) == shard_bytes(tiny_shards)


def test_two_processes_give_the_bytes_of_one(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path
) -> None:
    processes = {"devices": 2, "strategy": "ddp"}
    config = harvest_config(tmp_path / "two", tiny_backbone, tiny_texts, trainer=processes)
    run_command("predict", "-c", write_config(tmp_path / "two.yaml", config))
    assert shard_bytes(tmp_path / "two") == shard_bytes(tiny_shards)
    assert (tmp_path / "two" / MANIFEST).read_bytes() == (tiny_shards / MANIFEST).read_bytes()


@pytest.mark.slow
def test_torchrun_gives_the_bytes_of_one_process(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path
) -> None:
    processes = {"devices": 2, "strategy": "ddp"}
    config = harvest_config(tmp_path / "two", tiny_backbone, tiny_texts, trainer=processes)
    run_command("predict", "-c", write_config(tmp_path / "two.yaml", config), launcher=TORCHRUN)
    assert shard_bytes(tmp_path / "two") == shard_bytes(tiny_shards)
    assert (tmp_path / "two" / MANIFEST).read_bytes() == (tiny_shards / MANIFEST).read_bytes()


def test_two_processes_finish_a_harvest_that_has_one_shard_left(
    copied: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path
) -> None:
    (copied / "train-00001.safetensors").unlink()
    processes = {"devices": 2, "strategy": "ddp_fork"}  # forked, as starting anew takes long
    harvest_by_trainer(copied, tiny_backbone, tiny_texts, trainer=processes)
    assert shard_bytes(copied) == shard_bytes(tiny_shards)


def killed_after_its_first_shard(out: Path, backbone: Path, texts: Path, **settings: Any) -> dict[Path, int]:
    """A harvest in a process of its own, killed with SIGKILL; the shards it left, with the time of their writing."""
    arguments = (out, backbone, texts)
    process = multiprocessing.get_context("fork").Process(target=harvest_by_trainer, args=arguments, kwargs=settings)
    process.start()
    deadline = time.monotonic() + 60
    while not list(out.glob("train-*.safetensors")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    return {path: path.stat().st_mtime_ns for path in out.glob("*-*.safetensors")}


def test_a_harvest_killed_in_the_middle_goes_on_to_the_same_bytes(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path
) -> None:
    many: dict[str, Any] = {"windows": {"train": 27, "validation": 3}, "data": {"windows_per_shard": 1}}
    whole = harvest_by_trainer(tmp_path / "whole", tiny_backbone, tiny_texts, **many)
    for attempt in range(5):  # on a busy machine the harvest may be done before it is killed
        out = tmp_path / f"killed{attempt}"
        there = killed_after_its_first_shard(out, tiny_backbone, tiny_texts, **many)
        if 1 <= len(there) < 30:
            break
    assert 1 <= len(there) < 30 and not (out / MANIFEST).exists(), "not killed in the middle"

    harvest(out, tiny_backbone, tiny_texts, **many)
    assert shard_bytes(out) == shard_bytes(whole)
    assert (out / MANIFEST).read_bytes() == (whole / MANIFEST).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in there} == there, "shards that were there were made again"


def test_a_truncated_shard_is_made_again(
    copied: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path
) -> None:
    path = copied / "train-00001.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    harvest_by_trainer(copied, tiny_backbone, tiny_texts)
    assert shard_bytes(copied) == shard_bytes(tiny_shards)


def test_a_missing_shard_is_made_again_and_the_others_are_left_alone(
    copied: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path
) -> None:
    (copied / "validation-00000.safetensors").unlink()
    kept = {path: path.stat().st_mtime_ns for path in copied.glob("*-*.safetensors")}
    harvest_by_trainer(copied, tiny_backbone, tiny_texts)
    assert shard_bytes(copied) == shard_bytes(tiny_shards)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_harvest_killed_between_the_last_shard_and_the_manifest_writes_the_manifest(
    copied: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path
) -> None:
    (copied / MANIFEST).unlink()
    harvest_by_trainer(copied, tiny_backbone, tiny_texts)
    assert (copied / MANIFEST).read_bytes() == (tiny_shards / MANIFEST).read_bytes()


def test_a_limited_run_leaves_no_manifest_and_can_be_gone_on_with(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path
) -> None:
    out = harvest_by_trainer(tmp_path / "out", tiny_backbone, tiny_texts, trainer={"limit_predict_batches": 2})
    assert len(list(out.glob("*-*.safetensors"))) == 2 and not (out / MANIFEST).exists()
    harvest_by_trainer(out, tiny_backbone, tiny_texts)
    assert (out / MANIFEST).read_bytes() == (tiny_shards / MANIFEST).read_bytes()


@pytest.mark.gpu
def test_a_harvest_on_the_gpu_is_one_on_the_cpu(
    tmp_path: Path, tiny_shards: Path, tiny_backbone: Path, tiny_texts: Path
) -> None:
    found = shards_of(harvest(tmp_path / "shards", tiny_backbone, tiny_texts, trainer={"accelerator": "gpu"}))
    for name, theirs in shards_of(tiny_shards).items():
        assert torch.equal(found[name]["token"], theirs["token"])
        torch.testing.assert_close(found[name]["keys"], theirs["keys"], atol=2e-3, rtol=2e-3)
        assert (found[name]["lifespan"] == theirs["lifespan"]).float().mean() > 0.995
