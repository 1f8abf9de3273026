"""Work that may take only so much memory: done in a child with a limit of its own."""

from __future__ import annotations

import multiprocessing
import resource
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil

from shearling import ShearlingError


def within(megabytes: int, work: Callable[[], Any]) -> Any:
    """What ``work`` returns, or the words of its ShearlingError, if it needs no more memory.

    The child is a fork that may have so much more address space than it has at its start.
    """
    context = multiprocessing.get_context("fork")
    heard, said = context.Pipe(duplex=False)
    child = context.Process(target=_limited, args=(megabytes, work, said))
    child.start()
    said.close()
    try:
        kind, answer = heard.recv()
    except EOFError:
        kind, answer = "died", child.exitcode
    child.join()
    assert kind in ("done", "refused"), f"{kind}: {answer}"
    return answer


def _limited(megabytes: int, work: Callable[[], Any], said: Connection) -> None:
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 1_000_000, resource.RLIM_INFINITY))
    try:
        said.send(("done", work()))
    except ShearlingError as error:
        said.send(("refused", str(error)))
    except BaseException:
        said.send(("failed", traceback.format_exc()))
