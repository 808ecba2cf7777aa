"""Names of the Hugging Face hub, and time limits and errors of connections to it."""

import functools
import sys
import time
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, set_client_factory, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

CONNECT_SECONDS = 3
REMEMBERED_SECONDS = 60  # for which an answer of `hub_trouble` holds


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


def is_local(name: str | Path) -> bool:
    """Return whether a name stands for a file or folder of this machine, so that the hub is not asked for it.

    A Path does, and so does a string that exists here or cannot be a hub id ("owner/name", or "name" alone).
    """
    text = str(name)
    return (
        isinstance(name, Path)
        or text.startswith((".", "~", "/"))
        or "\\" in text
        or text.count("/") > 1
        or text.endswith("/")
        or Path(text).exists()
    )


def hub_trouble() -> str | None:
    """Return why the hub does not answer; None if it does.

    It is asked once, without the retries of huggingface_hub, which take 25 seconds.
    """
    return _trouble(constants.ENDPOINT, constants.HF_HUB_OFFLINE, int(time.monotonic() / REMEMBERED_SECONDS))


@functools.lru_cache(maxsize=1)
def _trouble(endpoint: str, offline: bool, _: int) -> str | None:
    """Ask an endpoint of the hub, once for each period of time."""
    if offline:
        return "HF_HUB_OFFLINE is set"
    longest = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        get_session().head(endpoint, timeout=(min(CONNECT_SECONDS, longest), longest, longest, longest))
    except (connection_error(), OfflineModeIsEnabled, OSError) as error:
        return f"the hub does not answer: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    return None


def was_downloaded(name: str, file: str, revision: str | None = None) -> bool:
    """Return whether a file of a hub repository was downloaded before."""
    try:
        return isinstance(try_to_load_from_cache(name, file, revision=revision), str)
    except HFValidationError:
        return False


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
