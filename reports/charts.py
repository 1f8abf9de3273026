"""All charts of a report, in order."""

from __future__ import annotations

from collections.abc import Sequence

from reports.chart import Chart
from reports.cuts import find_cuts
from reports.pruning_charts import heads, hidden_dims, layers, neurons, reconstruction
from reports.quality_charts import (
    quality_by_position,
    quality_by_size,
    quality_by_speed,
    tasks_by_model,
)
from reports.run_folder import Run
from reports.training_charts import (
    gradient_norms,
    heldout,
    learning_rates,
    losses,
    mixes,
    speeds,
)


def make_charts(run: Run, rivals: Sequence[Run] = ()) -> list[Chart]:
    """All charts that the run has data for."""
    charts = [quality_by_size(run, rivals), quality_by_speed(run, rivals)]
    charts += [tasks_by_model(run), quality_by_position(run)]
    training = (losses, heldout, mixes, learning_rates, gradient_norms, speeds)
    charts += [maker(run) for maker in training]
    cut = (layers, heads, neurons, hidden_dims, reconstruction)
    charts += [maker(each) for each in find_cuts(run) for maker in cut]
    return [chart for chart in charts if chart is not None]
