"""Time limits of requests to the hub, against a server that accepts a connection and never answers."""

import socket
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from smartkv.io.hub import connection_error, limit_hub_waiting


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
