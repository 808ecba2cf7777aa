"""Full disks, folders that cannot be written to, two runs in one folder, files that are not what they were."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch

from eval.common.resume import Measurements
from smartkv.errors import SmartKVError
from smartkv.io.locks import LOCK, lock_folder
from smartkv.shards.manifest import MANIFEST, Manifest
from smartkv.texts.sources import SourceConfig, resolve_source
from tests.harm import Payload, full_disk
from tests.lightning_fixtures import (
    ROOT,
    error_line,
    gates_config,
    harvest,
    harvest_config_at,
    prose,
    refused,
    run_cli,
    shard_bytes,
    write_config,
)
from tests.models import write_tiny_shards

# -- disks ------------------------------------------------------------------------------------------------------------


def test_a_harvest_on_a_full_disk_stops_in_a_line_and_goes_on_when_there_is_room(
    tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    config = harvest_config_at(out, tiny_backbone, tiny_texts)
    room = min(len(data) for name, data in shard_bytes(tiny_shards).items() if name.startswith("train")) - 1
    with full_disk(room):
        said = error_line(refused(capsys, "predict", "-c", config))
    assert "could not be written: File too large" in said
    assert not (out / MANIFEST).exists() and [path.name for path in out.glob(".*")] == [LOCK]
    run_cli("predict", "-c", config)
    assert shard_bytes(out) == shard_bytes(tiny_shards)


def test_cells_on_a_full_disk_keep_what_was_measured(tmp_path: Path) -> None:
    cells = Measurements(tmp_path / "cells", {})
    cells.measured("first", lambda: 1)
    with full_disk(100), pytest.raises(SmartKVError, match="could not be written"):
        cells.measured("second", lambda: "x" * 1000)
    assert Measurements(tmp_path / "cells", {}).measured("first", lambda: 2) == 1


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="/proc is a folder in which nobody can make files")
def test_a_folder_that_cannot_be_written_to_is_told_in_a_line(
    tiny_backbone: Path, tiny_texts: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may write where the mode forbids it, so the folder is one that the kernel keeps."""
    config = gates_config(tiny_shards, Path("/proc/smartkv"))
    config["trainer"]["logger"] = False
    said = error_line(refused(capsys, "fit", "-c", write_config(tmp_path / "fit.yaml", config)))
    assert "/proc/smartkv cannot be written to" in said
    with pytest.raises(SmartKVError, match="cannot be written to"):
        lock_folder("/proc/smartkv")


# -- two runs ---------------------------------------------------------------------------------------------------------


def _hold_until_told(folder: str, held: Any, told: Any) -> None:
    lock_folder(folder)
    held.set()
    told.wait(60)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A folder that another process holds; it lets go at the end."""
    context = multiprocessing.get_context("fork")
    holding, told = context.Event(), context.Event()
    process = context.Process(target=_hold_until_told, args=(str(tmp_path / "held"), holding, told))
    process.start()
    assert holding.wait(60)
    yield tmp_path / "held"
    told.set()
    process.join()


def test_a_second_run_into_a_folder_is_told_of_the_first(
    held: Path, tiny_shards: Path, tiny_backbone: Path, tiny_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(held.parent / "fit.yaml", gates_config(tiny_shards, held))
    assert f"another run is writing into {held}" in error_line(refused(capsys, "fit", "-c", config))
    config = harvest_config_at(held, tiny_backbone, tiny_texts)
    assert f"another run is writing into {held}" in error_line(refused(capsys, "predict", "-c", config))
    with pytest.raises(SmartKVError, match="another run"):
        Measurements(held / "compare.cells", {})
    assert sorted(path.name for path in held.iterdir()) == [LOCK]


def test_a_killed_run_leaves_no_lock_behind(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    holding, told = context.Event(), context.Event()
    process = context.Process(target=_hold_until_told, args=(str(tmp_path), holding, told))
    process.start()
    assert holding.wait(60)
    process.kill()
    process.join()
    lock_folder(tmp_path)
    lock_folder(tmp_path)  # the same process may ask again


# -- files that lie ---------------------------------------------------------------------------------------------------


def flipped(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_flipped_bit_in_a_shard_stops_the_fit_and_names_the_shard(
    share: float, tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = harvest(tmp_path / "shards", tiny_backbone, tiny_texts)
    path = shards / "train-00001.safetensors"
    flipped(path, int(share * 8 * path.stat().st_size))
    config = write_config(tmp_path / "fit.yaml", gates_config(shards, tmp_path / "fit"))
    said = error_line(refused(capsys, "fit", "-c", config))
    assert str(path) in said and ("SHA-256" in said or "damaged" in said)


@pytest.mark.parametrize("strategy", ["ddp_fork", pytest.param("ddp", marks=pytest.mark.slow)])
def test_what_one_process_finds_damaged_is_said_by_all_of_them(
    strategy: str, tmp_path: Path, tiny_backbone: Path, tiny_texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = harvest(tmp_path / "shards", tiny_backbone, tiny_texts)
    path = shards / "train-00001.safetensors"  # the second process reads it
    flipped(path, int(0.5 * 8 * path.stat().st_size))
    trainer = {"devices": 2, "strategy": strategy}
    config = write_config(tmp_path / "fit.yaml", gates_config(shards, tmp_path / "fit", trainer=trainer))
    if strategy == "ddp":
        command = [sys.executable, "main.py", "fit", "-c", str(config)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2
        lines = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
        (said,) = lines  # each process may say it
    else:
        said = error_line(refused(capsys, "fit", "-c", config))
    assert str(path) in said


def test_a_manifest_that_lists_anothers_shard_is_found_out(tmp_path: Path) -> None:
    manifest = write_tiny_shards(tmp_path / "shards")
    folder, (first, second) = manifest.folder, manifest.shards[:2]
    data = json.loads((folder / MANIFEST).read_text())
    data["shards"][0]["sha256"], data["shards"][1]["sha256"] = second.sha256, first.sha256
    (folder / MANIFEST).write_text(json.dumps(data))
    lying = Manifest.read(folder)
    with pytest.raises(SmartKVError, match="SHA-256"):
        lying.verify(lying.shards)
    manifest.verify(manifest.shards)


def test_a_checkpoint_with_code_in_it_is_not_loaded(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = tmp_path / "ran"
    torch.save({"state_dict": {}, "evil": Payload(ran)}, tmp_path / "evil.ckpt")
    config = write_config(tmp_path / "fit.yaml", gates_config(tiny_shards, tmp_path / "fit"))
    said = error_line(refused(capsys, "fit", "-c", config, "--ckpt_path", tmp_path / "evil.ckpt"))
    assert "more than numbers" in said and not ran.exists()


# -- a hub that does not answer ---------------------------------------------------------------------------------------


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """Takes connections and never says a word."""
    server = socket.create_server(("127.0.0.1", 0))
    open_: list[socket.socket] = []

    def take() -> None:
        while True:
            try:
                open_.append(server.accept()[0])
            except OSError:
                return

    threading.Thread(target=take, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()
    for connection in open_:
        connection.close()


class _BreaksOff(BaseHTTPRequestHandler):
    """Says how long a file is, and sends the beginning alone."""

    def do_HEAD(self) -> None:
        if "/api/" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in (("ETag", '"abc"'), ("X-Repo-Commit", "a" * 40), ("Content-Length", "1000")):
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"{")
        self.wfile.flush()
        time.sleep(30)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("what", ["load_backbone", "GateBank.from_pretrained"])
def test_a_hub_that_breaks_off_ends_in_a_line(what: str, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _BreaksOff)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    quick = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    quick |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HOME": str(tmp_path)}
    code = "import smartkv; from smartkv.errors import one_line_errors; from smartkv.io.hub import limit_hub_waiting\n"
    code += f"with one_line_errors():\n    limit_hub_waiting(); smartkv.{what}('someone/thing')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | quick, capture_output=True, text=True, timeout=120, check=False
    )
    server.shutdown()
    assert done.returncode == 2 and "'someone/thing'" in error_line(done.stderr), done.stderr[-2000:]


def test_a_hub_that_breaks_off_half_way_among_texts_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        yield {"short_book_title": "one", "publication_date": 1900, "url": "", "text": prose(200, 1)}
        raise ConnectionError("the peer closed the connection\nmore of it")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", broken)
    source = resolve_source(SourceConfig("pg19", origins=["hub"]), print)
    with pytest.raises(SmartKVError, match=r"emozilla/pg19 broke off \(the peer closed the connection\): give"):
        list(source.documents("train"))


@pytest.mark.slow
def test_a_hub_that_does_not_answer_ends_in_a_line(silent_hub: str, tmp_path: Path, tiny_texts: Path) -> None:
    config = harvest_config_at(tmp_path / "out", Path("someone/model"), tiny_texts)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    quick = {
        "HF_ENDPOINT": silent_hub,
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HOME": str(tmp_path),
    }
    command = [sys.executable, "main.py", "predict", "-c", str(config)]
    start = time.monotonic()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | quick,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "someone/model" in error_line(done.stderr)
    print(f"told after {time.monotonic() - start:.0f} s")
