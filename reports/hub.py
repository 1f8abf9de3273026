"""Is the Hugging Face hub there? Asked before waiting for it, and before asking it again."""

from __future__ import annotations

import errno
import os
import socket
import urllib.request
from collections.abc import Iterable, Iterator
from urllib.parse import SplitResult, urlsplit

NO_ANSWER = "which doesn't answer here"
"""In the reason of a task that was skipped because the hub was not there."""
FAILED_NOW = "which could not give them now"
"""In the reason of a task that was skipped for a fault that passes."""
FROM_CACHE = "set HF_HUB_OFFLINE=1 if they are in the cache"
_NETWORK = ("httpx", "requests", "urllib3", "aiohttp")
"""Beginnings of the modules of errors that come from the network, whatever they are called."""
_BUSY = (408, 425, 429)


def hub_answers(timeout: float = 3.0) -> bool:
    """Whether the hub's host accepts connections; offline mode asks nobody and tries the cache."""
    if hub_is_off():
        return True
    host = _endpoint()
    try:
        if through_proxy():  # the hub's own name may then not even be known here
            return True
        port = host.port or (80 if host.scheme == "http" else 443)
        socket.create_connection((host.hostname or "", port), timeout).close()
    except (OSError, ValueError):
        return False
    return True


def through_proxy() -> bool:
    """Whether the hub is asked through a proxy, so that a connection of our own says nothing."""
    host = _endpoint()
    named = {host.scheme, "all"} & urllib.request.getproxies().keys()
    return bool(named) and not urllib.request.proxy_bypass(host.hostname or "")


def _endpoint() -> SplitResult:
    return urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


def hub_is_off() -> bool:
    """Whether the user has told the hub's library to stay offline."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def worth_another_try(reasons: Iterable[object]) -> bool:
    """Whether tasks that were skipped for these reasons could be measured now."""
    return any(map(is_passing, reasons)) and not hub_is_off() and hub_answers()


def is_passing(reason: object) -> bool:
    """Whether a task that was skipped for this reason is tried again when the hub answers."""
    return NO_ANSWER in str(reason) or FAILED_NOW in str(reason)


def may_pass(error: BaseException) -> bool:
    """Whether what failed may go well another time: no connection, a time-out, a busy server.

    A server that refuses (401, 403) or knows no such data (404) says the same tomorrow.
    """
    return any(map(_is_fault, _behind(error)))


def fills_disk(error: BaseException) -> bool:
    """Whether an error comes of a full disk; datasets asks for room beforehand, with no number."""
    return any(
        isinstance(each, OSError)
        and (each.errno in (errno.ENOSPC, errno.EDQUOT) or "Not enough disk space" in str(each))
        for each in _behind(error)
    )


def fills_memory(error: BaseException) -> bool:
    """Whether an error comes of a lack of memory."""
    return any(isinstance(each, MemoryError) for each in _behind(error))


def _is_fault(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status in _BUSY or status >= 500
    from_network = type(error).__module__.startswith(_NETWORK)
    return from_network or isinstance(error, ConnectionError | TimeoutError)


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those under which a library hid it, also by ``from None``."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
