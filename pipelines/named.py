"""What a command's argument names: a run, a stage of one, a model here, or one on the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from reports.run_folder import Run, Stage, earlier_settings, file_name, open_scorecard, read_run
from shearling import ShearlingError


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder."""
    return (path / "run.json").is_file() or (path / "stages").is_dir()


def last_measured(run: Path, *, tell: Callable[[str], None]) -> Stage:
    """The model that a run stands for; ``tell`` hears which it is, and why not one behind it.

    Raises:
        ShearlingError: none of its models has been measured, or what a later one's scorecard says
            can't be read: the one before it is not what the user means.
    """
    read = read_run(run)
    if not read.measured:
        raise ShearlingError(
            f"No model of the run {run} has been measured yet.",
            hint=f"Finish it with `shearling run`, or see `shearling status {run}`.",
        )
    stage = read.measured[-1]
    behind = read.models[read.models.index(stage) + 1 :]
    for later in behind:
        _refuse_damaged(read, later)
    reasons = "".join(f"; {later.name} is not measured yet ({later.state})" for later in behind)
    tell(f"{run}: its last measured model is {stage.name}{reasons}")
    return stage


def _refuse_damaged(run: Run, stage: Stage) -> None:
    """Of a stage without results: its scorecard, where there is one, can be read."""
    scorecard = run.folder / "stages" / file_name(stage.name) / "scorecard.json"
    if not scorecard.is_file():
        return
    try:
        open_scorecard(scorecard)
    except ShearlingError as error:
        raise ShearlingError(
            error.what,
            hint=f"`shearling resume {run.folder}` writes it anew, or name another stage, as in "
            f"{run.folder / 'stages' / 'teacher'}.",
        ) from error


def refuse_earlier(stage: Path, *, kept: str, measured: bool) -> None:
    """Refuse a stage that its run doesn't show either: a command would mix two recipes unseen.

    ``kept`` is what to name instead, to use it all the same; with ``measured`` a scorecard of
    other settings is refused too.

    Raises:
        ShearlingError: the stage holds what was made with earlier settings.
    """
    found = earlier_settings(stage)
    if found == "made" or (found == "measured" and measured):
        raise ShearlingError(
            f"{stage} was {found} with earlier settings than its run has now.",
            hint="Finish the run with `shearling run` or `shearling resume`; to use the old result "
            f"all the same, name {stage / kept}.",
        )


def find_model(named: str, *, role: str = "model", tell: Callable[[str], None]) -> str:
    """Where the model lies that a user names: a run stands for its last measured model, a stage
    for its model or its export. What is no folder (a file, a hub id) comes back as it is.

    ``tell`` hears which stage a run stands for.

    Raises:
        ShearlingError: a run or a stage without a model of its present settings, or no such path.
    """
    path = Path(named).expanduser()
    if is_run(path):
        stage = last_measured(path, tell=tell)
        path = path / "stages" / stage.name
    elif not path.exists() and path.parent.name == "stages" and path.parent.is_dir():
        known = ", ".join(sorted(stage.name for stage in path.parent.iterdir()))
        raise ShearlingError(
            f"The {role} {named} does not exist.", hint=f"Stages of that run: {known or 'none'}."
        )
    elif not path.is_dir() or (path / "config.json").is_file():
        return named
    if (path / "model").is_dir():
        refuse_earlier(path, kept="model", measured=False)
        return str(path / "model")
    if (path / "export").is_dir():
        refuse_earlier(path, kept="export", measured=False)
        ggufs = sorted((path / "export").glob("*.gguf"))
        return str(ggufs[0] if ggufs else path / "export")
    return named
