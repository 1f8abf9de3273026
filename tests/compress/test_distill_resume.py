"""Killed at any moment and started again: the same losses and weights, to the last bit."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.checkpointing import (
    TrainingState,
    load_best,
    load_checkpoint,
    save_best,
    save_checkpoint,
)
from compress.distill import SavingTimes, distill
from compress.interrupts import StopRequest
from compress.settings import DistillSettings, without_effect
from shearling import ShearlingError, read_json, sha256_of_json, write_json

SETTINGS: dict[str, Any] = {
    "tokens": 32 * 8 * 24,
    "batch_tokens": 32 * 8,
    "learning_rate": 5e-3,
    "precision": "float32",
    "evaluate_every": 5,
    "save_every_seconds": 0,
    "ema": 0.9,
    "optimizer": "muon",
}

CHILD = """
import json, sys, time
from pathlib import Path
import torch
from compress.distill import distill
from compress.settings import DistillSettings
torch.set_num_threads(1)
teacher, student, out, text, settings = sys.argv[1:]
try:
    distill(Path(teacher), Path(student), Path(out), Path(text),
            DistillSettings(**json.loads(settings)), progress=lambda *a, **k: time.sleep(0.02))
except KeyboardInterrupt:
    sys.exit(130)
"""


def child(teacher: Path, student: Path, out: Path, text: Path) -> subprocess.Popen[bytes]:
    paths = [str(path) for path in (teacher, student, out, text)]
    command = [sys.executable, "-c", CHILD, *paths, json.dumps(SETTINGS)]
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )


def wait_for_lines(process: subprocess.Popen[bytes], metrics: Path, count: int) -> None:
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if metrics.is_file() and len(metrics.read_bytes().splitlines()) >= count:
            return
        time.sleep(0.005)


def interrupt_after(step: int) -> Callable[[dict[str, Any]], None]:
    """Told of metrics, sends SIGTERM when that step is done."""

    def told(line: dict[str, Any]) -> None:
        if line["step"] == step and "loss" in line:
            signal.raise_signal(signal.SIGTERM)

    return told


def curve(out: Path) -> list[dict[str, Any]]:
    """All lines without what a clock says."""
    clocks = {"seconds", "tokens_per_second"}
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]


@pytest.fixture(scope="module")
def whole(
    tiny_llama: Path,
    tiny_student: Path,
    tiny_transfer_set: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole")
    distill(tiny_llama, tiny_student, out, tiny_transfer_set, DistillSettings(**SETTINGS))
    return out


def same(out: Path, whole: Path) -> None:
    assert curve(out) == curve(whole)
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (out, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bits(
    whole: Path, tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for lines, pause in ((4, 0.0), (11, 0.013), (20, 0.027)):
        process = child(tiny_llama, tiny_student, out, tiny_transfer_set)
        wait_for_lines(process, out / "metrics.jsonl", lines)
        time.sleep(pause)  # into the writing of a checkpoint, or just past it
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (out / "model").exists()
    assert child(tiny_llama, tiny_student, out, tiny_transfer_set).wait(120) == 0
    same(out, whole)


def test_sigterm_finishes_the_step_and_saves(
    whole: Path, tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = child(tiny_llama, tiny_student, out, tiny_transfer_set)
    wait_for_lines(process, out / "metrics.jsonl", 6)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    checkpoint = load_checkpoint(out / "resume")
    assert checkpoint is not None
    assert checkpoint.step == max(line["step"] for line in curve(out))
    distill(tiny_llama, tiny_student, out, tiny_transfer_set, DistillSettings(**SETTINGS))
    same(out, whole)


Folders = tuple[Path, Path, Path, Path]


@pytest.fixture
def interrupted(
    tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> Folders:
    """A run that was stopped behind step 3: its folders, as `distill` takes them."""
    folders = (tiny_llama, tiny_student, tmp_path, tiny_transfer_set)
    with pytest.raises(KeyboardInterrupt):
        distill(*folders, DistillSettings(**SETTINGS), on_metrics=interrupt_after(3))
    return folders


def test_a_checkpoint_with_what_is_no_longer_kept_goes_on(
    whole: Path, interrupted: Folders, tmp_path: Path
) -> None:
    """Earlier ones counted ``windows_seen``."""
    path = tmp_path / "resume" / "step-00000003" / "state.json"
    state = {**read_json(path), "windows_seen": 24}
    del state["sha256"]
    write_json(path, {**state, "sha256": sha256_of_json(state)})
    distill(*interrupted, DistillSettings(**SETTINGS))
    same(tmp_path, whole)


def test_another_kind_of_device_measures_its_own_precision(
    whole: Path, interrupted: Folders, tmp_path: Path
) -> None:
    path = tmp_path / "resume" / "step-00000003" / "state.json"
    state = read_json(path)
    assert state["device"] == "cpu"
    elsewhere = {"device": "cuda", "precision": {**state["precision"], "name": "bfloat16"}}
    state |= elsewhere
    del state["sha256"]
    write_json(path, {**state, "sha256": sha256_of_json(state)})
    distill(*interrupted, DistillSettings(**SETTINGS))
    same(tmp_path, whole)


def test_a_model_that_cannot_be_written_costs_no_training(
    whole: Path,
    tiny_llama: Path,
    tiny_student: Path,
    tiny_transfer_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folders = (tiny_llama, tiny_student, tmp_path, tiny_transfer_set)
    # Where saving takes long, checkpoints come seldom: not at the end.
    monkeypatch.setattr("compress.distill._SAVING_PART", 1e9)
    with monkeypatch.context() as patch:
        patch.setattr("compress.distill.save_student", full)
        with pytest.raises(ShearlingError, match="disk is full"):
            distill(*folders, DistillSettings(**{**SETTINGS, "save_every_seconds": 1e-9}))
    told: list[dict[str, Any]] = []
    distill(*folders, DistillSettings(**SETTINGS), on_metrics=told.append)
    assert not told, "nothing was trained or evaluated again"
    same(tmp_path, whole)


def test_what_a_recipe_calls_the_stage_changes_nothing(
    whole: Path, tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    """Nor how often it saves; and Muon's arithmetic stays what it was measured to be."""
    from pipelines.recipe import DistillStage

    first = DistillStage(kind="distill", name="one", **SETTINGS)
    again = DistillStage(kind="distill", name="two", **{**SETTINGS, "save_every_seconds": 100})
    folders = (tiny_llama, tiny_student, tmp_path, tiny_transfer_set)
    with pytest.raises(KeyboardInterrupt):
        distill(*folders, first, on_metrics=interrupt_after(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.course.wide_products", lambda *_: True)
        distill(*folders, again)
    same(tmp_path, whole)


def test_a_stage_that_needs_less_memory_goes_on(interrupted: Folders, tmp_path: Path) -> None:
    """What a lack of memory is answered with changes results by rounding at most."""
    before = curve(tmp_path)
    smaller = {"micro_batch_windows": 1, "gradient_checkpointing": True, "chunk_tokens": 16}
    distill(*interrupted, DistillSettings(**SETTINGS, **smaller))
    assert curve(tmp_path)[: len(before)] == before
    assert curve(tmp_path)[-1]["step"] == 24


def test_a_model_s_own_text_hangs_on_the_micro_batch() -> None:
    """It is drawn a micro-batch at a time, so there the setting decides on results."""
    assert "micro_batch_windows" in without_effect(DistillSettings(tokens=1))
    writes = without_effect(DistillSettings(tokens=1, on_policy=0.5))
    assert "micro_batch_windows" not in writes
    assert "chunk_tokens" in writes


@pytest.mark.parametrize("lost", [1, 700])
def test_of_a_shortened_log_whole_lines_stay(
    interrupted: Folders, tmp_path: Path, lost: int
) -> None:
    """Whatever befell the file, every line of it can be read and what is run anew is in it."""
    log = tmp_path / "metrics.jsonl"
    os.truncate(log, log.stat().st_size - lost)
    distill(*interrupted, DistillSettings(**SETTINGS))
    assert b"\0" not in log.read_bytes()
    assert [line["step"] for line in curve(tmp_path) if line["step"] > 3][-1] == 24


def test_a_run_that_goes_on_lets_go_of_its_checkpoint(interrupted: Folders, tmp_path: Path) -> None:
    """Mapped, the files of a checkpoint that was replaced would stay on the disk to the end."""
    mapped: list[str] = []

    def look(line: dict[str, Any]) -> None:
        if line["step"] == 10:
            mapped.extend(Path("/proc/self/maps").read_text().splitlines())

    distill(*interrupted, DistillSettings(**SETTINGS), on_metrics=look)
    assert mapped
    assert not [line for line in mapped if str(tmp_path) in line and "step-00000003" in line]


def test_saving_never_takes_more_than_a_twentieth_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("compress.distill.time.monotonic", lambda: now[0])
    usual, always = SavingTimes(60.0), SavingTimes(0.0)
    now[0] = 59.0
    assert (usual.due(), always.due()) == (False, True)
    now[0] = 60.0
    assert usual.due()
    for saving in (usual, always):
        with saving:
            now[0] += 10.0  # an 8B's
    now[0] += 189.0
    assert (usual.due(), always.due()) == (False, True)
    now[0] += 1.0 + 10.0  # the second was saved in the first one's wait
    assert usual.due()


def test_surpassed_weights_do_not_pile_up_between_checkpoints(
    tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    kept: list[set[str]] = []
    settings = {**SETTINGS, "evaluate_every": 1, "save_every_seconds": 3600}

    def look(line: dict[str, Any]) -> None:
        kept.append({path.name for path in (tmp_path / "resume").glob("best-*")})
        interrupt_after(9)(line)

    folders = (tiny_llama, tiny_student, tmp_path, tiny_transfer_set)
    with pytest.raises(KeyboardInterrupt):
        distill(*folders, DistillSettings(**settings), on_metrics=look)
    assert len(set.union(*kept)) > 2
    assert max(map(len, kept)) == 1
    # Beside the newest the one that the checkpoint at step 9 names: a kill goes back to it.
    kept.clear()
    distill(*folders, DistillSettings(**settings), on_metrics=look)
    assert max(map(len, kept)) == 2


def test_other_settings_do_not_go_on_from_a_checkpoint(
    tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    stop = threading.Event()

    def interrupt(*_: Any, **__: Any) -> None:
        if not stop.is_set():
            stop.set()
            signal.raise_signal(signal.SIGINT)

    settings = {**SETTINGS, "save_every_seconds": 100}
    with pytest.raises(KeyboardInterrupt):
        distill(
            tiny_llama,
            tiny_student,
            tmp_path,
            tiny_transfer_set,
            DistillSettings(**settings),
            progress=interrupt,
        )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    other = DistillSettings(**{**SETTINGS, "learning_rate": 1e-3})
    with pytest.raises(ShearlingError, match="other settings"):
        distill(tiny_llama, tiny_student, tmp_path, tiny_transfer_set, other)


def test_the_second_signal_acts_as_before() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_in_another_thread_no_handler_is_installed() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with StopRequest() as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def checkpoint_at(step: int) -> TrainingState:
    tensors = {"student": {"w": torch.full((3,), float(step))}}
    return TrainingState(step=step, state={"best_step": 2}, tensors=tensors)


def test_the_best_weights_are_those_that_were_kept_last(tmp_path: Path) -> None:
    """Several processes kept parts for a step, were killed, and one went on from before it."""
    parts = tmp_path / "best-00000004" / "student"
    parts.mkdir(parents=True)
    save_best(tmp_path, 4, {"weight": torch.ones(2)})
    kept = load_best(tmp_path, 4)
    assert not isinstance(kept, Path)
    assert kept["weight"].tolist() == [1, 1]


def test_a_newer_checkpoint_replaces_the_older_and_leftovers(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint_at(1))
    (tmp_path / ".step-00000002.partial-x").mkdir()
    (tmp_path / "best-00000001.safetensors").touch()
    (tmp_path / "best-00000002.safetensors").touch()
    save_checkpoint(tmp_path, checkpoint_at(2))
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"step-00000002", "best-00000002.safetensors"}
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded.tensors["student"]["w"], torch.full((3,), 2.0))


def test_a_failed_write_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, checkpoint_at(1))

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.hashed.save_file", full_disk)
    with pytest.raises(ShearlingError, match="disk is full"):
        save_checkpoint(tmp_path, checkpoint_at(2))
    monkeypatch.undo()
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.step == 1


def flips(file: Path) -> Iterator[int]:
    """Turn over one bit of each byte of a file, one after another; gives the byte's place."""
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        yield place
    file.write_bytes(whole)


def test_any_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    """In any byte of any file, the weights of the best evaluation among them."""
    save_best(tmp_path, 2, {"w": torch.arange(4.0), "b": torch.tensor(True)})
    save_checkpoint(tmp_path, checkpoint_at(3))
    step = tmp_path / "step-00000003"
    for file in (step / "student.safetensors", step / "state.json"):
        for _ in flips(file):
            with pytest.raises(ShearlingError):
                load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path) is not None
    for _ in flips(tmp_path / "best-00000002.safetensors"):
        with pytest.raises(ShearlingError, match="damaged") as caught:
            load_best(tmp_path, 2)
        assert str(tmp_path) in caught.value.hint
    assert torch.equal(load_best(tmp_path, 2)["w"], torch.arange(4.0))


def test_a_damaged_checkpoint_is_refused_with_a_word(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint_at(1))
    file = tmp_path / "step-00000001" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ShearlingError, match="damaged") as caught:
        load_checkpoint(tmp_path)
    assert str(tmp_path) in caught.value.hint
