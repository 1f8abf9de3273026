"""Groups of tasks in a scorecard: of lm-eval's 57 tasks of MMLU people ask for one number.

A group counts as one task; its members stand beside it, and their facts name it as `group`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def counted_as(card: Mapping[str, Any], task: str) -> str:
    """The group that counts the task's documents, or the task itself."""
    return str(card.get("tasks", {}).get(task, {}).get("group") or task)


def whole_results(card: Mapping[str, Any]) -> dict[str, Any]:
    """The scorecard's results without those of tasks that a group counts."""
    results = card.get("results", {}).items()
    return {task: metrics for task, metrics in results if counted_as(card, task) == task}
