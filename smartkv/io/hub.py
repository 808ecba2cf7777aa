"""The hub, when it does not answer."""

import sys
from typing import Any

from huggingface_hub import constants, get_session, set_client_factory


def limit_hub_waiting() -> None:
    """Give up on what the hub leaves unanswered for `HF_HUB_DOWNLOAD_TIMEOUT` seconds (10 unless set): by itself,
    huggingface_hub waits for some answers for ever. For command lines: it holds for the whole process."""
    client = get_session()
    if _limit in client.event_hooks["request"]:
        return
    hooks = {"request": [*client.event_hooks["request"], _limit], "response": client.event_hooks["response"]}
    set_client_factory(lambda: type(client)(event_hooks=hooks, follow_redirects=True, timeout=None))


def connection_error() -> type[Exception]:
    """What a connection to the hub raises that fails half-way: the HTTPError of httpx, or of what huggingface_hub
    took for it, under whichever name."""
    error: type[Exception] = sys.modules[type(get_session()).__module__.partition(".")[0]].HTTPError
    return error


def _limit(request: Any) -> None:
    """A hook: each request brings the time limits along that its caller has set, or none."""
    longest = constants.HF_HUB_DOWNLOAD_TIMEOUT
    given = request.extensions.get("timeout", {})
    waits = {name: given.get(name) for name in ("connect", "read", "write", "pool")}
    limits = {name: longest if wait is None else min(wait, longest) for name, wait in waits.items()}
    request.extensions = {**request.extensions, "timeout": limits}
