from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from padding import other_ids
from shearling_process import Shearling, command, environment
from typer.main import get_command

from pipelines import terminal
from pipelines.accelerators import CPU_UTILISATION, Machine
from pipelines.cli import app
from pipelines.commands.runs import _run_command
from pipelines.export import export_model
from pipelines.plan import make_plan, teacher_facts
from pipelines.preflight import check_shapes
from pipelines.recipe import Recipe, load_recipe
from pipelines.starter import DISTILL_SECONDS, TOKENS, starter_recipe
from shearling import ShearlingError, __version__, read_json, silent
from students.settings import ExportSettings
from students.shape import Shape
from teachers.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
CLI: Any = get_command(app)
COMMANDS: dict[str, Any] = CLI.commands


def options_of(name: str) -> set[str]:
    return {option for parameter in COMMANDS[name].params for option in parameter.opts}


# --- help ---------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy() -> None:
    """What help costs is what it loads; tests/bench/bench_help.py has the time."""
    asked = environment(PYTHONPROFILEIMPORTTIME="1")
    done = subprocess.run(command("--help"), env=asked, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    # A line for each module: its own microseconds | those of all it loads | its name.
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert {"pipelines", "typer", "rich"} <= loaded
    heavy = {"torch", "transformers", "torch_pruning", "datasets", "lm_eval", "safetensors", "gguf"}
    assert not loaded & (heavy | {"pydantic", "numpy", "yaml", "jinja2", "asyncio", "http"})


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str, shearling: Shearling) -> None:
    done = shearling(name, "--help")
    assert done.returncode == 0
    assert "Example: shearling " + name in " ".join(done.stdout.split())
    assert all(parameter.help for parameter in COMMANDS[name].params)


def test_version(shearling: Shearling) -> None:
    assert shearling("--version").stdout == f"shearling {__version__}\n"


def test_the_shell_completes_commands() -> None:
    """What a shell asks after `shearling --install-completion`, when Tab is pressed."""
    code = "from pipelines.cli import app; app(prog_name='shearling')"
    asked = {
        "_SHEARLING_COMPLETE": "complete_bash",
        "COMP_WORDS": "shearling re",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**asked), capture_output=True, text=True
    )
    assert done.stdout.split() == [name for name in COMMANDS if name.startswith("re")]


def test_the_shell_completes_names_of_recipes() -> None:
    asked = {
        "_SHEARLING_COMPLETE": "complete_bash",
        "COMP_WORDS": "shearling run llama-2",
        "COMP_CWORD": "2",
    }
    code = "from pipelines.cli import app; app(prog_name='shearling')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**asked), capture_output=True, text=True
    )
    assert done.stdout.split() == ["llama-2-7b-to-1.3b", "llama-2-7b-to-2.7b"]


def test_colours_only_on_a_terminal(shearling: Shearling) -> None:
    done = shearling("run", "nothing")
    assert done.returncode == 2
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "quickstart", "--colour"], ["sing"], ["eval", "x", "--limit", "0"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str], shearling: Shearling) -> None:
    done = shearling(*arguments)
    assert done.returncode == 2
    assert done.stderr


# --- status, report -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["status", "report"])
def test_a_folder_that_is_no_run(name: str, shearling: Shearling, tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        done = shearling(name, folder)
        assert done.returncode == 2
        assert "Error: " in done.stderr


# --- init ---------------------------------------------------------------------------------------


def test_init_writes_a_recipe_that_validates(shearling: Shearling, tmp_path: Path) -> None:
    assert shearling("init").returncode == 0
    recipe = load_recipe(str(tmp_path / "recipe.yaml"))
    assert recipe.teacher == load_recipe("quickstart").teacher
    again = shearling("init")
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert shearling("init", "--force").returncode == 0


def test_init_fits_the_shape_to_the_teacher(
    shearling: Shearling, tiny_llama: Path, tmp_path: Path
) -> None:
    done = shearling("init", "--teacher", tiny_llama, "--out", "my recipe: 1.yaml")
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(str(tmp_path / "my recipe: 1.yaml"))
    teacher = Shape.from_config(read_json(tiny_llama / "config.json"))
    check_shapes(recipe, teacher)
    assert recipe.stages[0].shape_spec() == {"num_hidden_layers": 3, "intermediate_size": 48}
    assert recipe.teacher.model == str(tiny_llama)


@pytest.mark.parametrize("teacher", ["./nowhere", "meta-llama/Llama-3.1-8B", "x.gguf", 'a"b: #c'])
def test_init_with_teachers_that_are_not_here(
    shearling: Shearling, tmp_path: Path, teacher: str
) -> None:
    done = shearling("init", "--teacher", teacher)
    if teacher == "./nowhere":
        assert done.returncode == 2
        assert not (tmp_path / "recipe.yaml").exists()
    else:
        assert load_recipe(str(tmp_path / "recipe.yaml")).teacher.model == teacher


def machine(**changes: Any) -> Machine:
    """A laptop that multiplies at 100 GFLOP/s and has 16 GB."""
    rates = {"float32": 1e11, "bfloat16": 1e11, "float64": 5e10}
    facts: dict[str, Any] = {
        "name": "a laptop", "source": "made up", "rates": rates, "memory_bytes": 16 * 10**9,
        "memory_rate": 2e10,
        "share": CPU_UTILISATION, "disk_free_bytes": 10**11, "device": "cpu",
    }  # fmt: skip
    return Machine(**{**facts, **changes})


def starter(tmp_path: Path, teacher: str, machine: Machine) -> tuple[Recipe, str]:
    """The recipe that init writes for a teacher on a machine, and its text."""
    text = starter_recipe(teacher, Path("mine.yaml"), machine)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    return load_recipe(str(tmp_path / "mine.yaml")), text


def test_init_distils_as_long_as_the_machine_is_fast(tmp_path: Path) -> None:
    """Ten times the speed is about ten times the tokens, and both are told in minutes."""
    lengths = []
    for speed in (3e12, 3e13, 3e14):
        rates = {"float32": speed, "bfloat16": speed, "float64": speed / 2}
        here = machine(rates=rates, memory_bytes=10**11)
        recipe, text = starter(tmp_path, "meta-llama/Llama-3.2-1B", here)
        lengths.append(recipe.stages[1].tokens)
        assert "a laptop" in text
        assert re.search(r"tokens: \d+ # about (\d+ min|\d+ h|[\d.]+ s)", text)
        plan = make_plan(recipe, teacher_facts(recipe.teacher), here)
        (row,) = [row for row in plan["stages"] if row["name"] == "distill"]
        assert row["seconds"] <= DISTILL_SECONDS or lengths[-1] == TOKENS[0]
    assert lengths == sorted(set(lengths))


def test_init_saves_memory_where_it_is_short(tmp_path: Path) -> None:
    teacher = "meta-llama/Llama-3.2-1B"
    recipe, _ = starter(tmp_path, teacher, machine(memory_bytes=10**11))
    assert recipe.stages[1].targets == "live"
    facts = teacher_facts(recipe.teacher)
    needed = make_plan(recipe, facts, machine())["stages"]
    distill = next(row["memory_bytes"] for row in needed if row["name"] == "distill")
    tight, text = starter(tmp_path, teacher, machine(memory_bytes=int(distill / 0.9) - 10**7))
    assert tight.stages[1].micro_batch_windows == 1
    assert "will not work" not in text
    hopeless, text = starter(tmp_path, teacher, machine(memory_bytes=10**9))
    assert hopeless.stages[1].gradient_checkpointing
    assert "# It will not work as it is: " in text


def test_init_takes_the_published_shape_for_a_published_teacher(tmp_path: Path) -> None:
    recipe, _ = starter(tmp_path, "meta-llama/Llama-3.1-8B", machine())
    assert recipe.stages[0].shape == "llama-3.2-3b"


def test_init_of_a_gguf_knows_its_shape(tiny_llama: Path, tmp_path: Path) -> None:
    export_model(
        str(tiny_llama), tmp_path / "small", ExportSettings(to="gguf", dtype="float16"),
        cache=tmp_path, progress=silent,
    )  # fmt: skip
    (file,) = (tmp_path / "small").glob("*.gguf")
    recipe, text = starter(tmp_path, str(file), machine())
    assert recipe.stages[0].shape_spec() == {"num_hidden_layers": 3, "intermediate_size": 48}
    assert "its header" in text


def test_no_name_can_break_out_of_the_recipes_comments(tiny_llama: Path, tmp_path: Path) -> None:
    evil = tmp_path / "x\ndevice: mps\n#"
    evil.symlink_to(tiny_llama)
    recipe, _ = starter(tmp_path, str(evil), machine())
    assert recipe.device == "auto"
    assert recipe.teacher.model == str(evil)


# --- eval ---------------------------------------------------------------------------------------


def test_eval_measures_a_stage_of_a_run(
    run: Path, shearling: Shearling, tiny_mirror: Path, tmp_path: Path
) -> None:
    arguments = ("eval", run / "stages" / "distill", "--tasks", "copa", "--mirror", tiny_mirror)
    done = shearling(*arguments, "--out", "card.json", "--json")
    assert done.returncode == 0, done.stderr
    scorecard = json.loads(done.stdout)
    assert scorecard == json.loads((tmp_path / "card.json").read_text())
    assert scorecard["results"]["copa"]["acc"]["value"] is not None
    assert "copa" in shearling(*arguments, "--limit", "2").stdout


def test_eval_of_nothing(shearling: Shearling, tiny_llama: Path, tmp_path: Path) -> None:
    assert shearling("eval", "./nowhere", "--tasks", "copa").returncode == 2
    done = shearling("eval", tiny_llama, "--tasks", "copaa")
    assert done.returncode == 2
    assert "copa" in done.stderr
    assert shearling("eval", tiny_llama, "--tasks", " , ").returncode == 2


@pytest.mark.parametrize(
    ("mirror", "message"),
    [("taks", "Not one task could be measured"), ("copa.jsonl", "is a file, not a folder")],
)
def test_eval_that_measures_nothing_is_an_error(
    shearling: Shearling, tiny_llama: Path, tmp_path: Path, mirror: str, message: str
) -> None:
    (tmp_path / "copa.jsonl").write_text("{}\n")
    asked = ("--tasks", "copa", "--mirror", mirror, "--out", "card.json")
    done = shearling("eval", tiny_llama, *asked)
    assert done.returncode == 2
    assert message in done.stderr
    assert mirror in done.stderr
    assert not (tmp_path / "card.json").exists()


def test_eval_refuses_a_teacher_with_another_tokenizer(
    shearling: Shearling, tiny_llama: Path, tmp_path: Path
) -> None:
    other_ids(tiny_llama, tmp_path / "other")
    done = shearling("eval", tiny_llama, "--teacher", "other", "--tasks", "wikitext2")
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert f"in other, 384 in {tiny_llama}" in said
    assert "leave --teacher out" in said


def test_eval_with_a_teacher_and_nothing_to_hold_against_it(
    shearling: Shearling, tiny_llama: Path
) -> None:
    done = shearling("eval", tiny_llama, "--teacher", tiny_llama, "--tasks", "copa")
    assert done.returncode == 2
    assert "Add wikitext2 to --tasks" in done.stderr


# --- JSON for programs --------------------------------------------------------------------------


def test_decisions_as_json(run: Path, recipe_file: Path, shearling: Shearling) -> None:
    again = ("run", recipe_file, "--out", run, "--set", "distill.tokens=2048", "--dry-run")
    steps = json.loads(shearling(*again, "--json").stdout)["steps"]
    assert [step["step"] for step in steps if step["runs"]] == ["distill", "distill/benchmark"]
    assert "recipe.distill.tokens 1024 -> 2048" in steps[5]["reason"]
    refused = shearling("run", recipe_file, "--json")
    assert refused.returncode == 2
    assert "--dry-run" in refused.stderr


def test_what_is_likely_not_meant_is_told_before_a_run(
    recipe_file: Path, shearling: Shearling
) -> None:
    given = (recipe_file, "--set", "transfer_set.sources.0.split=test")
    given += ("--set", "distill.batch_tokens=64")
    dry = ("run", *given, "--dry-run")
    (warning,) = json.loads(shearling(*dry, "--json").stdout)["warnings"]
    assert warning.startswith("transfer_set.sources.grammar.split: test has no effect")
    assert f"Warning: {warning}" in shearling(*dry).stdout
    planned = json.loads(shearling("plan", *given, "--json").stdout)
    assert warning.removesuffix(".") in planned["warnings"]


# --- what texts promise -------------------------------------------------------------------------


def hints() -> Iterator[tuple[str, str]]:
    """(file:line, text) of every hint in the sources; what is filled in stands as X."""
    for package in ("shearling.py", "students", "teachers", "compress", "reports", "pipelines"):
        path = ROOT / package
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword) and node.arg == "hint":
                    yield f"{file.relative_to(ROOT)}:{node.value.lineno}", text_of(node.value)


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "X"


def test_every_hint_names_commands_and_keys_that_exist() -> None:
    every_option = {option for name in COMMANDS for option in options_of(name)}
    wrong = []
    found = list(hints())
    assert len(found) > 50
    for place, text in found:
        named = re.findall(r"`shearling ([a-z]+)\b", text)
        unknown = [f"shearling {name}" for name in named if name not in COMMANDS]
        options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"`X -m pip.*?`", "", text))
        unknown += [option for option in options if option not in every_option]
        for section, key in re.findall(r"\b(teacher|transfer_set|benchmark)\.([a-z_]+)", text):
            settings: Any = Recipe.model_fields[section].annotation
            if key not in settings.model_fields and key != "json":
                unknown.append(f"{section}.{key}")
        wrong += [f"{place}: {name}" for name in unknown]
    assert not wrong


def commands_in(text: str) -> list[str]:
    """The shearling and make commands in a Markdown text's sh blocks."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [line for line in joined if line.startswith(("shearling ", "make ", ".venv/bin/she"))]


DOCUMENTS = [path for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")) if path.is_file()]
DOCUMENTED = [
    pytest.param(line, id=f"{path.name}: {line}")
    for path in DOCUMENTS
    for line in dict.fromkeys(commands_in(path.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize("line", DOCUMENTED)
def test_every_command_in_the_documents_works(
    line: str,
    shearling: Shearling,
    run: Path,
    tiny_llama: Path,
    recipe_data: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Each is run, on a small run under the quickstart's name; long ones as a dry run."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in words[1:] if "=" not in word]
        assert all(re.search(rf"^{re.escape(t)}:", makefile, re.MULTILINE) for t in targets)
        return
    name, arguments = words[1], words[2:]
    if name.startswith("-"):
        assert shearling(*words[1:]).returncode == 0
        return
    assert name in COMMANDS
    shutil.copytree(run, tmp_path / "runs" / "quickstart", symlinks=True)
    (tmp_path / "my-llama").symlink_to(tiny_llama)
    for recipe in ("recipe.yaml", "my-recipe.yaml"):
        if name != "init":
            (tmp_path / recipe).write_text(yaml.safe_dump({**recipe_data, "name": recipe}))
    if name == "run":
        arguments.append("--dry-run")
    if name == "regress":
        arguments = ["--help"]  # what `make test` runs after these tests
    done = shearling(name, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_are_found_in_markdown() -> None:
    text = "```sh\n$ make test\nshearling run a \\\n  --set b=c\n# x\n```\n```py\nshearling x\n```"
    assert commands_in(text) == ["make test", "shearling run a  --set b=c"]


def test_the_examples_of_the_help_parse() -> None:
    for name, found in COMMANDS.items():
        line = found.epilog.removeprefix("Example: ")
        words = shlex.split(line)
        assert words[:2] == ["shearling", name]
        found.make_context(name, words[2:])


# --- the display --------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 6])
def test_plain_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """A minute of work in one part or in parts of ten seconds: no silence of over 20 seconds."""
    from io import StringIO

    from rich.console import Console

    from pipelines import display

    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    out = StringIO()
    with display.Display(Console(file=out, width=200)) as shown:
        for done in range(1, 13):
            now[0] += 5
            part = f"part {(done - 1) * parts // 12}" if parts > 1 else "train"
            shown.progress("distill", part, done, 12, loss=2.5, tokens_per_second=1234.5)
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    if parts == 1:
        assert lines[0].startswith("  distill: train 3/12 · loss 2.5 · 1,234 tokens/s · ")
        assert lines[0].endswith("left")


def test_what_takes_long_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE_SECONDS", 0.05)
    with terminal.patience("counting sheep"):
        pass
    assert capsys.readouterr().err == ""
    with terminal.patience("counting sheep"):
        time.sleep(0.5)
    assert capsys.readouterr().err == "  counting sheep\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (245, "4 min 05 s"), (7380, "2 h 03 min")]
)
def test_times_as_people_say_them(seconds: float, text: str) -> None:
    from pipelines.display import format_seconds

    assert format_seconds(seconds) == text


def test_errors_and_hints_reach_the_user(shearling: Shearling) -> None:
    done = shearling("run", "quickstrat")
    assert done.returncode == 2
    first, second = done.stderr.splitlines()[:2]
    assert first.startswith("Error: There is no recipe quickstrat")
    assert "shearling init" in second


def test_a_shearling_error_shows_its_remedy() -> None:
    assert str(ShearlingError("what", hint="remedy")) == "what\nremedy"


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        command("--version"), capture_output=True, text=True, check=False, env=environment()
    )
    assert done.stdout == f"shearling {__version__}\n"


@pytest.mark.parametrize(
    ("parameters", "told"), [(49_440, "49.4k"), (134_515_008, "134.5M"), (None, "–")]
)
def test_a_headline_tells_small_models_too(parameters: int | None, told: str) -> None:
    from pipelines.display import headline

    assert headline({"parameters": parameters, "results": {}}) == f"{told} parameters"


# --- families -----------------------------------------------------------------------------------


def test_families_as_a_table_and_as_json(shearling: Shearling) -> None:
    printed = shearling("families").stdout
    assert "405,853,388,800" in printed
    assert "500,000 x32" in printed
    data = json.loads(shearling("families", "--json").stdout)
    assert [row["name"] for row in data["families"]] == list(FAMILIES)
    assert {recipe["name"] for recipe in data["training_recipes"]} >= {"llama-1", "llama-2"}


def test_families_are_whole_on_a_narrow_terminal(
    shearling: Shearling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = shearling("families").stdout
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    for told in (" 405.9B ", " 128/8x128 ", " 128,256\n", " 500,000 x32 ", " SentencePiece BPE"):
        assert told in printed
    assert printed.count("llama-3.1-405b ") == 2  # a table, and the columns that go on below


def test_one_familys_facts_come_with_their_sources(shearling: Shearling) -> None:
    printed = shearling("families", "llama-2-7b").stdout
    assert "training.warmup_steps               2,000" in printed
    assert "https://arxiv.org/abs/2307.09288" in printed
    done = shearling("families", "llama-2-8b")
    assert done.returncode == 2
    assert "Did you mean 'llama-" in done.stderr


def test_the_command_that_goes_on_is_the_one_that_was_given() -> None:
    lock = Path("lock.json")
    again = _run_command("quickstart", ["seed=1"], Path("out"), 2, lock, verify=True)
    assert again == (
        "shearling run quickstart --set seed=1 --out out --processes 2 --locked lock.json --verify"
    )
    assert _run_command("quickstart", None, None, 1, None, False) == "shearling run quickstart"
