"""Commands that look at runs: watch, serve, resume, doctor, and what they must not do."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shearling_process import Shearling

from pipelines import doctor, watch
from pipelines.journal import Pace
from pipelines.serve import make_server
from pipelines.watch import watch_run
from reports.liveness import process_identity
from shearling import ShearlingError

# --- watch --------------------------------------------------------------------------------------


def at_work(run: Path) -> dict[str, Any]:
    """Make a finished run look as it did in the middle of its last stage."""
    journal: dict[str, Any] = json.loads((run / "run.json").read_text())
    journal |= {"state": "running", "finished": None}
    journal["stages"][-1]["state"] = "running"
    journal["current"] = {
        "step": "distill",
        "what": "distill",
        "done": 40,
        "total": 100,
        "seconds_left": 83.0,
        "numbers": {"loss": 2.5},
    }
    (run / "run.json").write_text(json.dumps(journal))
    (run / "run.lock").write_text(json.dumps(process_identity()))
    return journal


def finish_at_the_next_look(
    monkeypatch: pytest.MonkeyPatch, run: Path, journal: dict[str, Any], **ending: Any
) -> None:
    """The run ends while the one who watches it sleeps."""

    def finish(seconds: float) -> None:
        journal["stages"][-1]["state"] = ending["state"]
        aside = run / ".run.json"
        aside.write_text(json.dumps({**journal, "current": None, **ending}))
        os.replace(aside, run / "run.json")

    clock = SimpleNamespace(sleep=finish, monotonic=time.monotonic)
    monkeypatch.setattr(watch, "time", clock)


def test_watch_prints_what_changes_until_the_run_ends(
    run: Path, shearling: Shearling, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_at_the_next_look(monkeypatch, run, at_work(run), state="done")
    done = shearling("watch", run, "--every", "0.1")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("teacher: done, ")
    assert "distill: running" in lines
    assert "  distill: distill 40/100 · loss 2.5 · 1 min 23 s left" in lines
    assert lines[-1] == "tiny: done"
    assert "\x1b" not in done.stdout


def test_watch_tells_a_failure(
    run: Path, shearling: Shearling, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = {"what": "The disk is full.", "hint": "Free some."}
    finish_at_the_next_look(monkeypatch, run, at_work(run), state="failed", error=error)
    done = shearling("watch", run, "--every", "0.1")
    assert done.returncode == 1
    assert "Error: The disk is full." in done.stdout
    assert "Go on with: shearling run tiny.yaml" in done.stdout


def test_watch_on_a_terminal_stays_in_place(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    from rich.console import Console

    finish_at_the_next_look(monkeypatch, run, at_work(run), state="done")
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    assert watch_run(run, console, every=0.1) == "done"
    assert "\x1b" in out.getvalue()
    assert "loss 2.5" in out.getvalue()


def test_the_time_left_counts_from_where_the_work_went_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    pace = Pace()
    assert pace.seconds_left("distill", 900, 1000) is None
    assert pace.seconds_left("distill", 910, 1000) == 90.0
    assert pace.seconds_left("distill", 1000, 1000) is None


# --- serve --------------------------------------------------------------------------------------


@pytest.fixture
def served(run: Path) -> Iterator[tuple[Path, int]]:
    server = make_server(run, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield run, server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_serve_follows_a_run_and_writes_nothing(served: tuple[Path, int]) -> None:
    run, port = served
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    code, page = ask(port, "/")
    assert code == 200
    assert "<title>tiny · Shearling</title>" in page
    assert 'http-equiv="refresh"' not in page
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before
    assert json.loads(ask(port, "/status.json")[1])["state"] == "done"
    at_work(run)
    assert '<meta http-equiv="refresh" content="10">' in ask(port, "/")[1]
    shutil.rmtree(run)
    assert ask(port, "/")[0] == 503


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "", "localhost:80"])
def test_serve_answers_only_to_its_own_name(served: tuple[Path, int], host: str) -> None:
    assert ask(served[1], "/", Host=host)[0] == 421
    assert ask(served[1], "/status.json", Host=f"localhost:{served[1]}")[0] == 200


def test_serve_has_no_way_to_write_or_to_other_files(served: tuple[Path, int]) -> None:
    _, port = served
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert ask(port, "/", method)[0] == 501
    for path in ("/run.json", "/../run.json", "/stages/", "//etc/passwd", "/%2e%2e/x", "/x" * 500):
        assert ask(port, path)[0] == 404


def test_serve_listens_on_this_machine_only(served: tuple[Path, int]) -> None:
    with pytest.raises(ShearlingError, match="can't be used"):
        make_server(*served)
    addresses = {i[4][0] for i in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1"}:
        with (
            pytest.raises(ConnectionRefusedError),
            socket.create_connection((str(address), served[1]), 1),
        ):
            pass


def test_serve_of_no_run(shearling: Shearling, tmp_path: Path) -> None:
    assert shearling("serve", tmp_path).returncode == 2


# --- resume, locked -----------------------------------------------------------------------------


def test_resume_needs_no_recipe_but_the_runs_own(
    run: Path, shearling: Shearling, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scorecard = run / "stages" / "distill" / "scorecard.json"
    measured = json.loads(scorecard.read_text())["results"]
    for artefact in (run / "store").glob("benchmark-*"):
        if json.loads((artefact / "stage.json").read_text())["name"] == "distill/benchmark":
            shutil.rmtree(artefact)
    scorecard.unlink()
    done = shearling("resume", run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "distill: not run again: nothing changed" in done.stdout
    assert json.loads(scorecard.read_text())["results"] == measured
    status = json.loads(shearling("status", run, "--json").stdout)
    assert status["command"] == f"shearling resume {run}"


def test_a_locked_run_refuses_what_differs(
    run: Path, recipe_file: Path, shearling: Shearling, tmp_path: Path
) -> None:
    lock = json.loads((run / "lock.json").read_text())
    if lock["git"]:
        lock["git"] = None  # whether the checkout is clean is not what is tested
    (tmp_path / "lock.json").write_text(json.dumps(lock))
    arguments = ("run", recipe_file, "--out", run, "--locked", tmp_path / "lock.json")
    changes = {
        "python": "2.7.18",
        "packages": {**lock["packages"], "torch": "1.0"},
        "hardware": {**lock["hardware"], "processor": "Z80"},
    }
    (tmp_path / "lock.json").write_text(json.dumps({**lock, **changes}))
    done = shearling(*arguments, "--set", "distill.tokens=2048")
    assert done.returncode == 2
    for told in ("python 2.7.18 -> ", "torch 1.0 -> ", "processor Z80 -> "):
        assert told in done.stderr
    assert "distill: recipe.distill.tokens 1024 -> 2048" in done.stderr
    assert "prune: " not in done.stderr
    for wrong in ("[]", "{}", '{"steps": []}', "no JSON"):
        (tmp_path / "lock.json").write_text(wrong)
        done = shearling(*arguments)
        assert done.returncode == 2
        # The file is the user's own: nothing tells them to delete it.
        assert "Name the lock.json in the folder of a run" in done.stderr
        assert "Delete" not in done.stderr
    (tmp_path / "lock.json").unlink()
    (tmp_path / "lock.json").mkdir()
    assert "is no file" in shearling(*arguments).stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"state": 5}'])
def test_a_damaged_journal_is_written_anew_by_resume(
    content: str, run: Path, shearling: Shearling
) -> None:
    (run / "run.json").write_text(content)
    told = shearling("status", run)
    assert told.returncode == 2
    assert f"`shearling resume {run}` writes it anew" in told.stderr
    assert f"`shearling report {run}` shows" in told.stderr
    resumed = shearling("resume", run)
    assert resumed.returncode == 0, resumed.stderr
    assert shearling("status", run).returncode == 0


# --- doctor -------------------------------------------------------------------------------------


def test_doctor_examines_this_machine(shearling: Shearling) -> None:
    done = shearling("doctor", "--json")
    found = json.loads(done.stdout)
    names = [finding["name"] for finding in found["findings"]]
    assert {"python", "packages", "memory", "disk for runs", "cores", "bf16 on cpu"} <= set(names)
    assert found["fit"] == (done.returncode == 0)
    bf16 = next(finding for finding in found["findings"] if finding["name"] == "bf16 on cpu")
    assert "GFLOP/s" in bf16["found"]
    assert all(f["advice"] for f in found["findings"] if f["state"] != "ok")
    shown = shearling("doctor")
    assert all(name in shown.stdout for name in names)
    assert "\x1b" not in shown.stdout


def test_doctor_says_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = [tmp_path / "file", tmp_path / "file" / "x", Path("/proc/x")]
    for place in nowhere[: 3 if Path("/proc").is_dir() else 2]:
        found = {f["name"]: f for f in doctor.examine(tmp_path, place)["findings"]}
        assert found["disk for runs"]["state"] != "error"
        assert found["disk for downloads"]["state"] == "error", place
        assert "SHEARLING_CACHE" in found["disk for downloads"]["advice"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_doctor_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def requires(_: str) -> list[str]:
        return ["torch>=99", "no-such-package-here", 'pytest>=99; extra == "dev"']

    monkeypatch.setattr(doctor.importlib.metadata, "requires", requires)
    found = {f["name"]: f for f in doctor.examine(tmp_path, tmp_path)["findings"]}
    assert found["packages"]["state"] == "error"
    assert "torch" in found["packages"]["found"]
    assert "no-such-package-here is missing" in found["packages"]["found"]
    assert "pip install" in found["packages"]["advice"]
