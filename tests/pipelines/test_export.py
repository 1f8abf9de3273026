"""Exports, read back by this project's own GGUF reader and by transformers."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gguf import GGUFReader
from shapes import llama3_rope
from shearling_process import Shearling
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipelines.estimate import export_cost
from pipelines.export import export_checkpoint, write_card
from pipelines.tiny import make_tiny_llama
from reports import words
from shearling import ShearlingError, read_json
from students.export import QUANTISATIONS
from students.gguf_layout import gguf_name, hf_name
from students.settings import ExportSettings
from teachers.checkpoint import open_checkpoint
from teachers.gguf_file import convert, gguf_origin
from teachers.layout import expected_tensors

TEXTS = [
    "In 2023, 1234567 sheep; 3.14159 and 0x1F, ½ and x².",
    "emoji 🐑 👩‍👩‍👧‍👦 é",
    "def f(x):\n    return {'a': [x**2, \"b\"]}  # I'LL'd",
    "美洲驼是一种动物。二〇二三年,剪毛。",
    "  two spaces  and\n\n\ttabs ",
    b"caf\xe9 \xff".decode("utf-8", errors="replace"),
]


@torch.no_grad()
def logits(folder: Path, **kwargs: Any) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()
    found: torch.Tensor = model(torch.arange(40)[None] % 300).logits[0]
    return found


def exported(folder: Path, out: Path, **settings: Any) -> Path:
    facts = export_checkpoint(folder, out, ExportSettings(**settings), name="tiny")
    return out / facts["files"][0]


def read_back(file: Path, out: Path) -> Path:
    convert(file, out)
    return out


@pytest.fixture(scope="module", params=["tied", "llama3 rope, untied", "biases, linear rope"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths of 32 and more, so that the quantisations' blocks fit."""
    changes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    changes["initializer_range"] = 0.05
    if "llama3" in request.param:
        changes |= {
            "tie_word_embeddings": False,
            "num_key_value_heads": 4,
            "rope_parameters": llama3_rope(factor=32.0),
        }
    if "biases" in request.param:
        changes |= {"attention_bias": True, "mlp_bias": True}
        changes["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    return make_tiny_llama(tmp_path_factory.mktemp("export") / "model", seed=3, **changes)


def test_names_go_both_ways(model: Path) -> None:
    for name in expected_tensors(open_checkpoint(model).shape):
        assert hf_name(gguf_name(name)) == name


def test_a_gguf_in_full_precision_is_the_same_model(model: Path, tmp_path: Path) -> None:
    file = exported(model, tmp_path / "out", to="gguf", dtype="float32")
    back = read_back(file, tmp_path / "back")
    torch.testing.assert_close(logits(back), logits(model), rtol=0, atol=1e-5)
    before, after = (LlamaConfig.from_pretrained(folder) for folder in (model, back))
    for key in ("max_position_embeddings", "rms_norm_eps", "rope_parameters", "bos_token_id"):
        assert getattr(after, key) == getattr(before, key), key
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (back, model))
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids


def test_the_card_shows_how_to_read_the_gguf(model: Path, tmp_path: Path) -> None:
    """Its lines are run; a model that transformers would misread is not shown with it."""
    settings = ExportSettings(to="gguf", dtype="float32")
    facts = export_checkpoint(model, tmp_path, settings, name="tiny")
    write_card(tmp_path, {"results": {}}, None, name="tiny", history=("prune",), export=facts)
    card = (tmp_path / "README.md").read_text()
    assert f"llama-cli -m {facts['files'][0]} " in card
    config = LlamaConfig.from_pretrained(model)
    if config.rope_parameters["rope_type"] != "default":
        assert "```python" not in card
        return
    code = (
        card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path))
    )
    found: dict[str, Any] = {}
    exec(code, found)
    ids = torch.arange(40)[None] % 300
    with torch.no_grad():
        torch.testing.assert_close(found["model"](ids).logits[0], logits(model), rtol=0, atol=1e-5)
    theirs = AutoTokenizer.from_pretrained(model)
    assert found["tokenizer"](TEXTS[0]).input_ids == theirs(TEXTS[0]).input_ids


def test_transformers_reads_the_gguf_too(model: Path, tmp_path: Path) -> None:
    """It leaves out the tensor of RoPE factors and biases, so it is asked about the plain one."""
    config = LlamaConfig.from_pretrained(model)
    if config.rope_parameters["rope_type"] != "default":
        pytest.skip("transformers' own reader leaves out RoPE scaling")
    file = exported(model, tmp_path / "out", to="gguf", dtype="float32")
    theirs = logits(file.parent, gguf_file=file.name)
    torch.testing.assert_close(theirs, logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bf16", "f16", *QUANTISATIONS])
def test_quantised_ggufs_are_near(model: Path, tmp_path: Path, kind: str) -> None:
    dtype = {"bf16": "bfloat16", "f16": "float16"}.get(kind, "bfloat16")
    quantise = kind if kind in QUANTISATIONS else None
    file = exported(model, tmp_path / "out", to="gguf", dtype=dtype, quantise=quantise)
    back = read_back(file, tmp_path / "back")
    wanted, found = logits(model), logits(back)
    error = float((found - wanted).norm() / wanted.norm())
    most = {"f16": 0.005, "bf16": 0.04, "q8_0": 0.05, "q5_1": 0.25, "q5_0": 0.25}
    assert 0 < error < most.get(kind, 0.5)


def test_fewer_bits_make_a_smaller_file(model: Path, tmp_path: Path) -> None:
    sizes = [
        exported(model, tmp_path / kind, to="gguf", quantise=kind).stat().st_size
        for kind in ("q4_0", "q5_0", "q8_0")
    ]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


@pytest.mark.parametrize(
    ("hidden", "kind", "most"), [(64, "q4_0", "q4_0"), (48, "q4_0", "f16"), (48, "q8_0", "f16")]
)
def test_it_says_what_could_not_be_quantised(
    shearling: Shearling, tmp_path: Path, hidden: int, kind: str, most: str
) -> None:
    """Held against the file's own list of tensors."""
    widths = {"hidden_size": hidden, "intermediate_size": 96, "head_dim": 16}
    folder = make_tiny_llama(tmp_path / "model", **widths)
    done = shearling("export", folder, "--to", "gguf", "--quantise", kind, "--out", "a", "--json")
    facts = json.loads(done.stdout)
    counts: Counter[str] = Counter()
    tensors = GGUFReader(tmp_path / "a" / facts["files"][0]).tensors
    for tensor in tensors:
        counts[tensor.tensor_type.name.lower()] += int(tensor.n_elements)
    assert facts["shares"] == {kind: n / counts.total() for kind, n in counts.most_common()}
    assert next(iter(facts["shares"])) == most
    settings = ExportSettings(to="gguf", quantise=kind)
    planned = export_cost(open_checkpoint(folder).shape, settings, 2).disk
    assert planned == sum(int(tensor.n_bytes) for tensor in tensors)
    line = shearling("export", folder, "--to", "gguf", "--quantise", kind, "--out", "b").stdout
    share = f"; {100 * facts['shares'].get('f16', 0):.0f}% of the weights have rows that are no"
    assert (share in line) == (most == "f16"), line
    plain = shearling("export", folder, "--to", "gguf", "--dtype", "float16", "--out", "c").stdout
    assert "no multiple" not in plain  # 16 bits were asked for


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_in_another_dtype(model: Path, tmp_path: Path, dtype: str) -> None:
    exported(model, tmp_path / "out", to="hf", dtype=dtype)
    source = open_checkpoint(tmp_path / "out")
    assert source.dtype == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    bound = {"float32": 0.0, "bfloat16": 0.04, "float16": 0.005}[dtype]
    wanted = logits(model)
    assert float((logits(tmp_path / "out") - wanted).norm() / wanted.norm()) <= bound
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_weights_that_a_half_float_cannot_hold(tiny_llama: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "large")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_llama / name, tmp_path / "large" / name)
    for number, to in enumerate(("hf", "gguf")):
        with pytest.raises(ShearlingError, match=r"can't be written as float16|too large"):
            exported(tmp_path / "large", tmp_path / f"out{number}", to=to, dtype="float16")


@pytest.mark.parametrize(
    "where", ["tokenizers/llama2", "tokenizers/llama3", "models/stories260K/hf"]
)
def test_real_tokenizers_survive_the_gguf(shared_data: Path, tmp_path: Path, where: str) -> None:
    folder = shared_data / where
    theirs = AutoTokenizer.from_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(theirs) + 3,  # padding, as in models that round the vocabulary up
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            bos_token_id=theirs.bos_token_id,
            eos_token_id=theirs.eos_token_id,
        )
    ).save_pretrained(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        shutil.copyfile(file, tmp_path / "model" / file.name)
    file = exported(tmp_path / "model", tmp_path / "out", to="gguf", quantise="q8_0")
    ours = AutoTokenizer.from_pretrained(read_back(file, tmp_path / "back"))
    # SentencePiece, and so a GGUF, puts its space before any text; transformers' version of it
    # not before one that begins with a space.
    leading = [] if where.endswith("llama3") else [text for text in TEXTS if text[0] == " "]
    for text in [text for text in TEXTS if text not in leading]:
        assert ours(text).input_ids == theirs(text).input_ids


# --- the command and the stage ------------------------------------------------------------------


def test_export_of_a_stage_has_its_model_card(
    run: Path, shearling: Shearling, tmp_path: Path
) -> None:
    arguments = ("export", run / "stages" / "distill", "--out", tmp_path / "out")
    done = shearling(*arguments, "--to", "hf", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# tiny-distill" in card
    assert "model-index" in card
    assert "It was pruned and distilled with" in card
    assert "measured before" not in card  # the stage's weights are float32 as well
    assert torch.equal(logits(tmp_path / "out"), logits(run / "stages" / "distill" / "model"))
    half = ("--to", "hf", "--dtype", "bfloat16", "--out", "half")
    assert shearling("export", run / "stages" / "prune", *half).returncode == 0
    card = (tmp_path / "half" / "README.md").read_text()
    size = (tmp_path / "half" / "model.safetensors").stat().st_size
    assert f"{words.size(size)} as bfloat16" in card
    assert "It was pruned, not distilled, with" in card
    assert "before the model was converted to bfloat16" in card
    again = shearling(*arguments, "--to", "gguf")
    assert again.returncode == 2
    assert "already there" in again.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "onnx"], "to: "),
        (["--to", "hf", "--quantise", "q8_0"], "quantise needs to: gguf"),
        (["--to", "gguf", "--quantise", "q4_k"], "quantise: "),
    ],
)
def test_exports_that_cannot_be(
    tiny_llama: Path, shearling: Shearling, tmp_path: Path, options: list[str], message: str
) -> None:
    done = shearling("export", tiny_llama, "--out", tmp_path / "out", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def licensed(model: str, copied: Path) -> str:
    """A copy of a model that has terms."""
    shutil.copytree(model, copied)
    (copied / "NOTICE.txt").write_text("Sheep inside.")
    terms = "license: sheep-1\nbase_model: sheep/older-llama"
    (copied / "README.md").write_text(f"---\n{terms}\n---\n\n# A llama\n")
    return str(copied)


def test_an_export_stage_in_a_recipe(
    recipe_data: dict[str, Any], shearling: Shearling, tmp_path: Path
) -> None:
    data = copy.deepcopy(recipe_data)
    data["teacher"]["model"] = licensed(data["teacher"]["model"], tmp_path / "teacher")
    small = {"name": "small", "kind": "export", "to": "gguf", "quantise": "q8_0"}
    prune, distill = data["stages"]
    data["stages"] = [prune, small, distill, {**small, "name": "taught"}]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    done = shearling("run", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "tiny"
    (file,) = (folder / "stages" / "small" / "export").glob("*.gguf")
    assert file.name == "tiny-small-q8_0.gguf"
    card = (file.parent / "README.md").read_text()
    assert "It was pruned, not distilled, with" in card  # distill comes after it
    assert f"{words.size(file.stat().st_size)} as q8_0" in card
    assert "before the model was converted to q8_0" in card
    assert "library_name: gguf" in card
    # What a licence asks of those who pass the model on is at hand.
    for made in ("prune/model", "distill/model", "small/export", "taught/export"):
        assert (folder / "stages" / made / "NOTICE.txt").read_text() == "Sheep inside."
    assert "license: sheep-1\n" in card
    assert "base_model: sheep/older-llama\n" in card
    assert gguf_origin(file) == {"license": "sheep-1", "base_model": "sheep/older-llama"}
    taught = folder / "stages" / "taught" / "export" / "README.md"
    assert "It was pruned and distilled with" in taught.read_text()
    assert f"small: {file.name}, " in done.stdout
    assert "no multiple of 32 and stay in f16" in done.stdout  # 24 wide
    assert "small: not run again: nothing changed" in shearling("run", "tiny.yaml").stdout
    status = json.loads(shearling("status", folder, "--json").stdout)
    assert [row["state"] for row in status["stages"]] == ["done"] * 5
    # The plan was written before the work, and the report holds it against what happened.
    plan = read_json(folder / "plan.json")
    assert [row["name"] for row in plan["stages"]][-2:] == ["distill/benchmark", "taught"]
    assert "Plan against reality" in (folder / "report.html").read_text()
    told = (folder / "report.md").read_text().partition("## Plan against reality")[2]
    assert "| small | on disk |" in told
    assert "| small | parameters |" not in told
    done = shearling("export", folder, "--to", "gguf", "--out", "whole")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "whole").glob("*.gguf")
    assert gguf_origin(file) == {"license": "sheep-1", "base_model": "sheep/older-llama"}
    assert (tmp_path / "whole" / "NOTICE.txt").is_file()
    assert "license: sheep-1\n" in (tmp_path / "whole" / "README.md").read_text()


def test_options_that_do_not_fit_are_told_in_our_words(shearling: Shearling) -> None:
    quantised = shearling("export", "x", "--to", "hf", "--quantise", "q8_0", "--out", "y")
    assert quantised.returncode == 2
    assert "like that: quantise needs to: gguf; a Hugging Face folder is" in quantised.stderr
    unknown = shearling("export", "x", "--to", "onnx", "--out", "y")
    assert "like that: --to: should be 'hf' or 'gguf'." in unknown.stderr
