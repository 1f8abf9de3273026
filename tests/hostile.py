"""Text that would do harm in a page that does not escape it; and what bad input may lead to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from shearling import ShearlingError

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}]]><!--"


def hostile_cleaning() -> dict[str, Any]:
    """What cleaning tells, with hostile text in every place that takes text."""
    return {
        "documents_before": 10,
        "tokens_before": 1000,
        "documents_after": 7,
        "tokens_after": 600,
        "tokens_in_removed_lines": 40,
        "filters": [
            {
                "name": HOSTILE,
                "documents_before": 10,
                "tokens_before": 1000,
                "documents_removed": 3,
                "tokens_removed": 360,
                "reasons": {HOSTILE: 2, "rule": 1},
                "samples": [{"source": 0, "reason": HOSTILE, "text": HOSTILE}],
            }
        ],
        "benchmarks": {HOSTILE: 2, "copa": 0},
        "benchmarks_not_read": {"piqa": HOSTILE},
        "languages_before": {"en": 8, HOSTILE: 2},
        "languages_after": {"en": 7},
        "lengths_before": {"64": 4, "128": 6, HOSTILE: 1},
    }


@contextlib.contextmanager
def at_worst_a_message() -> Iterator[None]:
    """What happens inside may end in an error for users, with a remedy, and in no other."""
    try:
        yield
    except ShearlingError as error:
        if not error.what or not error.hint:
            raise AssertionError(f"no remedy: {error!r}") from error
