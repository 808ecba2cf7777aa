"""Names of the hub; time limits of requests to it, against a server that accepts a connection and never answers."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from smartkv.io.hub import connection_error, hub_trouble, is_local, limit_hub_waiting, was_downloaded


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def own_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A limit of 0.2 seconds, and a client of huggingface_hub's own before and after."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    set_client_factory(default_client_factory)
    yield
    set_client_factory(default_client_factory)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_request_is_given_up_when_the_limit_is_over(silent_server: str, timeout: float | None) -> None:
    limit_hub_waiting()
    start = time.monotonic()
    with pytest.raises(connection_error()):
        get_session().get(silent_server, timeout=timeout)
    assert time.monotonic() - start < 10


def test_a_shorter_time_that_the_caller_has_set_stays() -> None:
    limit_hub_waiting()
    (hook,) = [hook for hook in get_session().event_hooks["request"] if hook.__module__ == "smartkv.io.hub"]
    timeout = {"connect": 0.05, "read": 3.0}
    request = get_session().build_request("GET", "http://localhost", extensions={"timeout": timeout})
    hook(request)
    assert request.extensions["timeout"] == {"connect": 0.05, "read": 0.2, "write": 0.2, "pool": 0.2}


def test_setting_the_limit_twice_adds_one_hook_and_keeps_those_there_were() -> None:
    hooks = get_session().event_hooks["request"]
    limit_hub_waiting()
    limit_hub_waiting()
    assert len(get_session().event_hooks["request"]) == len(hooks) + 1
    assert get_session().event_hooks["request"][:-1] == hooks


def test_the_class_of_a_broken_connection_is_that_of_the_client() -> None:
    with pytest.raises(connection_error()):
        get_session().get("http://127.0.0.1:9")  # nobody listens there


# -- names, and a hub that does not answer ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [Path("owner/name"), "/owner/name", "./name", "~/name", "a/b/c", "owner/name/", "owner\\name", "here.txt"]
)
def test_files_folders_and_paths_are_local(name: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").touch()
    assert is_local(name)


@pytest.mark.parametrize("name", ["owner/name", "gpt2", "gone.txt"])
def test_what_may_be_a_hub_id_is_not(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local(name)


def test_a_hub_that_does_not_answer_is_told_with_the_reason_and_without_retries(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.monotonic()
    assert re.fullmatch("the hub does not answer: .*refused.*", hub_trouble() or "")
    assert time.monotonic() - start < 1 and caplog.text == ""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_trouble() == "HF_HUB_OFFLINE is set"


def test_a_silent_hub_is_given_up_when_the_limit_is_over(silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", silent_server)
    assert (hub_trouble() or "").startswith("the hub does not answer: ")


def test_a_hub_that_answers_anything_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # answers 501
        monkeypatch.setattr(BaseHTTPRequestHandler, "log_message", lambda *_: None)
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub_trouble() is None


def test_a_file_that_was_downloaded_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").touch()
    assert was_downloaded("owner/name", "config.json") and not was_downloaded("owner/other", "config.json")
    assert not was_downloaded("a/b/c", "config.json")
