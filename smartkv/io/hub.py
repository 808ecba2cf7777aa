"""Time limits and errors of connections to the Hugging Face hub."""

import sys
from typing import Any

from huggingface_hub import constants, get_session, set_client_factory


def limit_hub_waiting() -> None:
    """Give up on a request to the hub after `HF_HUB_DOWNLOAD_TIMEOUT` seconds (10 unless set) without an answer.

    By itself, huggingface_hub waits for some answers for ever. The limit holds for the whole process, so only commands
    should set it.
    """
    client = get_session()
    if _limit in client.event_hooks["request"]:
        return
    hooks = {"request": [*client.event_hooks["request"], _limit], "response": client.event_hooks["response"]}
    set_client_factory(lambda: type(client)(event_hooks=hooks, follow_redirects=True, timeout=None))


def connection_error() -> type[Exception]:
    """Return the class of the errors of a connection to the hub that breaks off.

    This is `HTTPError` of the HTTP library that huggingface_hub uses: httpx, or one that takes its place.
    """
    error: type[Exception] = sys.modules[type(get_session()).__module__.partition(".")[0]].HTTPError
    return error


def _limit(request: Any) -> None:
    """Request hook of httpx: cap each timeout of a request, and set those that its caller left open."""
    longest = constants.HF_HUB_DOWNLOAD_TIMEOUT
    asked = request.extensions.get("timeout", {})
    seconds = {name: asked.get(name) for name in ("connect", "read", "write", "pool")}
    limits = {name: longest if value is None else min(value, longest) for name, value in seconds.items()}
    request.extensions = {**request.extensions, "timeout": limits}
