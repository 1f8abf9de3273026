"""The house's arrows: pipelines -> reports, compress -> teachers -> students -> shearling.

Reads the imports of every file, those inside functions included, and fails on a wrong one.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "pipelines": {"pipelines", "reports", "compress", "teachers", "students", "shearling"},
    "reports": {"reports", "teachers", "students", "shearling"},
    "compress": {"compress", "teachers", "students", "shearling"},
    "teachers": {"teachers", "students", "shearling"},
    "students": {"students", "shearling"},
    "shearling.py": set(),
}
OURS = {"pipelines", "reports", "compress", "teachers", "students", "shearling"}


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level module) of each import of ours in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in OURS:
                yield node.lineno, name.split(".")[0]


def files_of(package: str) -> list[Path]:
    path = ROOT / package
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_arrow_points_the_wrong_way(package: str) -> None:
    files = files_of(package)
    assert files, f"{package} has no files: is the list of packages out of date?"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files
        for line, module in imported(path)
        if module not in MAY_IMPORT[package]
    ]
    assert not wrong


def test_a_wrong_arrow_would_be_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def late():\n    from pipelines.store import Store\n    return Store\n")
    assert list(imported(wrong)) == [(2, "pipelines")]


LIGHT = [
    "students.settings",
    "students.shape",
    "teachers.settings",
    "compress.settings",
    "reports.settings",
    "pipelines.recipe",
    "pipelines.steps",
    "pipelines.journal",
    "pipelines.cli",
]


def test_reading_a_recipe_loads_no_torch() -> None:
    """What answers before any work is done must not wait for torch."""
    code = f"import sys, {', '.join(LIGHT)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0


SAFE_ONLY_WITH = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}
NEVER = {
    f"{module}.{name}" for module in ("pickle", "dill", "joblib") for name in ("load", "loads")
}


def test_nothing_is_unpickled() -> None:
    """No pickle is ever opened; torch.load takes weights only."""
    wrong = []
    for path in (path for package in MAY_IMPORT for path in files_of(package)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {(k.arg, ast.unparse(k.value)) for k in node.keywords}
            needs_word = called == "torch.load" or any(k == "allow_pickle" for k, _ in given)
            if called in NEVER or (needs_word and SAFE_ONLY_WITH.get(called) not in given):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called}")
    assert not wrong
