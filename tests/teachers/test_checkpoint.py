"""Checkpoints: what is whole opens to the same numbers, what isn't is refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from pipelines.export import export_checkpoint
from shearling import ShearlingError
from students.settings import ExportSettings
from teachers.checkpoint import (
    Checkpoint,
    import_teacher,
    open_checkpoint,
)
from teachers.origin import card_origin, origin_of
from teachers.settings import TeacherSettings
from teachers.tokenizer import copy_companions, copy_tokenizer, load_tokenizer
from teachers.weights import is_finite

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A tiny Llama that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


TERMS = {"license": "other", "license_name": "sheep-1", "license_link": "LICENSE"}


@pytest.fixture
def licensed(copy: Path) -> Path:
    """A tiny Llama with a licence, as those on the hub have it."""
    card = {"license": "other", **TERMS, "base_model": "sheep/older-llama", "tags": ["llama"]}
    (copy / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n\n# A llama\n")
    (copy / "LICENSE").write_text("Shear, but feed.")
    (copy / "USE_POLICY.md").write_text("Be kind.")
    return copy


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def reference(folder: Path) -> dict[str, torch.Tensor]:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def to_shards(folder: Path) -> None:
    LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(
        folder, max_shard_size="40KB"
    )
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def to_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("layout", [lambda folder: None, to_shards, to_bin])
def test_every_layout_opens_to_the_tensors_transformers_loads(
    copy: Path, layout: Callable[[Path], None]
) -> None:
    expected = reference(copy)
    layout(copy)
    checkpoint = open_checkpoint(copy)
    assert set(checkpoint.names()) == set(expected) - {"lm_head.weight"}
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
    assert checkpoint.tensor("model.norm.weight", torch.float16).dtype == torch.float16
    assert checkpoint.shape.parameters == sum(
        tensor.numel() for name, tensor in expected.items() if name != "lm_head.weight"
    )


def test_an_untied_head_is_a_tensor_of_its_own(tiny_llama_untied: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama_untied)
    head = checkpoint.tensor("lm_head.weight")
    assert torch.equal(head, reference(tiny_llama_untied)["lm_head.weight"])
    assert not torch.equal(head, checkpoint.tensor("model.embed_tokens.weight"))


def test_the_model_and_the_tokenizer_come_out(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    ids = checkpoint.tokenizer()("A lamb", return_tensors="pt").input_ids
    logits = checkpoint.model(torch.float32)(ids).logits
    assert logits.shape == (1, ids.shape[1], checkpoint.shape.vocab_size)


def test_missing_tensors_are_all_named(copy: Path) -> None:
    gone = ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"]
    edit_weights(copy, lambda tensors: [tensors.pop(name) for name in gone])
    with pytest.raises(ShearlingError) as caught:
        open_checkpoint(copy)
    assert "2 tensors are missing" in caught.value.what
    assert all(name in caught.value.what for name in gone)


def test_a_wrong_shape_is_named_with_both(copy: Path) -> None:
    edit_config(copy, intermediate_size=48)
    with pytest.raises(ShearlingError, match=r"gate_proj.weight has shape \[64, 32\].*\[48, 32\]"):
        open_checkpoint(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_found(copy: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][5, 7] = value

    edit_weights(copy, spoil)
    assert open_checkpoint(copy, values=False)
    with pytest.raises(ShearlingError, match=r"NaN or infinite.*layers.2.mlp.up_proj"):
        open_checkpoint(copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_finite_in_all_dtypes(dtype: torch.dtype) -> None:
    tensor = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(tensor)
    tensor[1, 1] = float("nan")
    assert not is_finite(tensor)
    assert is_finite(torch.empty(0))


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file_is_noticed(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ShearlingError, match=r"truncated|whole safetensors"):
        open_checkpoint(copy)


def test_a_damaged_header_is_noticed(copy: Path) -> None:
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:20] = b"[[[[[[[[[[[["
    file.write_bytes(content)
    with pytest.raises(ShearlingError, match="damaged safetensors header"):
        open_checkpoint(copy)


def test_missing_shards_are_all_named(copy: Path) -> None:
    to_shards(copy)
    for number in (1, 2):
        next(copy.glob(f"model-0000{number}-of-*")).unlink()
    with pytest.raises(ShearlingError) as caught:
        open_checkpoint(copy)
    assert "lacks 2 of" in caught.value.what
    assert "model-00001-of" in caught.value.what
    assert "model-00002-of" in caught.value.what


def test_an_index_can_not_point_out_of_the_folder(copy: Path) -> None:
    to_shards(copy)
    index = copy / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.norm.weight"] = "../other/model.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(ShearlingError, match="not a file of that folder"):
        open_checkpoint(copy)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo run > /tmp/shearling-evil",)


@pytest.mark.parametrize("length", [0, 30, 100, 200])
def test_a_cut_off_pickle_is_told(copy: Path, length: int) -> None:
    weights, file = load_file(copy / "model.safetensors"), copy / "pytorch_model.bin"
    (copy / "model.safetensors").unlink()
    torch.save(weights, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ShearlingError, match=r"\.bin can't be read as plain weights: ."):
        open_checkpoint(copy)


def test_a_single_file_counts_before_an_index_that_was_left(copy: Path) -> None:
    """As transformers has it: a folder that was saved again in one piece keeps its old index."""
    weights = load_file(copy / "model.safetensors")
    to_shards(copy)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 7.0)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert reference(copy)["model.norm.weight"][0] == 7.0
    assert open_checkpoint(copy).tensor("model.norm.weight")[0] == 7.0
    for shard in copy.glob("model-*.safetensors"):
        shard.unlink()
    assert open_checkpoint(copy).tensor("model.norm.weight")[0] == 7.0


def test_a_damaged_config_is_not_the_users_to_delete(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ShearlingError) as caught:
        import_teacher(TeacherSettings(model=str(copy)), copy / "out", cache=copy)
    assert "Delete" not in caught.value.hint
    assert "Download or copy the model again" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "told", "remedy"),
    [
        (RuntimeError("the storage gave up"), "broke off: the storage gave up", "it goes on"),
        (TimeoutError("timed out"), "broke off: timed out", "it goes on"),
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full", "HF_HOME"),
    ],
)
def test_a_download_that_breaks_off_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str, remedy: str
) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ShearlingError, match=told) as caught:
        import_teacher(TeacherSettings(model="sheep/tiny"), tmp_path / "out", cache=tmp_path)
    assert remedy in caught.value.hint


def test_a_pickle_with_code_is_refused_and_not_run(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Evil()}, copy / "pytorch_model.bin")
    with pytest.raises(ShearlingError, match="can't be read as plain weights"):
        open_checkpoint(copy)
    assert not Path("/tmp/shearling-evil").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mistral"}, "not read in place"),
        ({"model_type": "qwen3"}, "normalises queries and keys"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"attention_bias": True}, "q_proj.bias"),
        ({"num_hidden_layers": 10**12}, "1,000,000,000,000 layers"),
        ({"hidden_size": "wide"}, "not a usable Llama configuration"),
    ],
)
def test_what_a_stock_llama_can_not_hold_is_refused_by_name(
    copy: Path, changes: dict[str, Any], named: str
) -> None:
    edit_config(copy, **changes)
    with pytest.raises(ShearlingError) as caught:
        open_checkpoint(copy)
    assert named in caught.value.what


def test_a_rotary_embedding_on_all_of_the_head_may_be_named(copy: Path) -> None:
    edit_config(copy, rope_parameters={**LINEAR, "partial_rotary_factor": 1.0})
    assert open_checkpoint(copy)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("model.layers.0.self_attn.q_norm.weight", "QK norm"),
        ("model.layers.0.self_attn.q_proj.bias", "biases"),
        ("model.layers.0.mlp.experts.0.w1.weight", "experts"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "adapters"),
        ("model.layers.0.self_attn.q_proj.qweight", "quantised"),
        ("vision.weight", "does not have: vision.weight"),
    ],
)
def test_tensors_that_no_llama_has_are_explained(copy: Path, name: str, meaning: str) -> None:
    edit_weights(copy, lambda tensors: tensors.update({name: torch.zeros(4)}))
    with pytest.raises(ShearlingError) as caught:
        open_checkpoint(copy)
    assert meaning in caught.value.what


def test_an_old_checkpoints_frequencies_and_a_tied_copy_of_the_head_do_no_harm(copy: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(copy, add)
    assert open_checkpoint(copy)


@pytest.mark.parametrize("layout", [lambda folder: None, to_bin])
def test_a_tied_model_with_a_head_of_its_own_is_refused(
    copy: Path, layout: Callable[[Path], None]
) -> None:
    """transformers gives such a model the head of the file, a tied student would lose it."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][3, 5] += 1

    edit_weights(copy, add)
    layout(copy)
    with pytest.raises(ShearlingError, match="not its embedding") as caught:
        open_checkpoint(copy)
    assert "Set tie_word_embeddings to false" in str(caught.value.hint)
    edit_config(copy, tie_word_embeddings=False)
    head = open_checkpoint(copy).tensor("lm_head.weight")
    assert torch.equal(head, reference(copy)["lm_head.weight"])


def test_biases_that_the_config_mentions_are_part_of_the_model(tmp_path: Path) -> None:
    from pipelines.tiny import make_tiny_llama

    folder = make_tiny_llama(tmp_path / "biased", attention_bias=True, mlp_bias=True)
    checkpoint = open_checkpoint(folder)
    assert "model.layers.0.self_attn.o_proj.bias" in checkpoint.names()
    assert set(checkpoint.names()) == set(reference(folder)) - {"lm_head.weight"}


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_says_what_it_lacks(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(ShearlingError, match=missing):
        open_checkpoint(copy)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="not a folder"):
        open_checkpoint(tmp_path / "none")


def test_the_fingerprint_changes_with_any_byte_and_with_nothing_else(
    copy: Path, tmp_path: Path
) -> None:
    first = open_checkpoint(copy).fingerprint()
    again = Path(shutil.copytree(copy, tmp_path / "again"))
    assert open_checkpoint(again).fingerprint() == first
    (again / "README.md").write_text("not part of the model")
    assert open_checkpoint(again).fingerprint() == first
    edit_weights(again, lambda t: t["model.norm.weight"].mul_(1.0001))
    changed = open_checkpoint(again).fingerprint()
    assert changed != first
    text = (again / "tokenizer.json").read_text()
    (again / "tokenizer.json").write_text(text + " ")
    assert open_checkpoint(again).fingerprint() not in (first, changed)


def test_a_large_file_that_changed_is_hashed_anew(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teachers.file_memory.SMALL_BYTES", 0)
    first = open_checkpoint(copy).fingerprint()
    assert open_checkpoint(copy).fingerprint() == first
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    assert open_checkpoint(copy).fingerprint() != first


# --- import ---


def test_a_folder_is_linked_and_its_facts_told(tiny_llama: Path, tmp_path: Path) -> None:
    facts = import_teacher(
        TeacherSettings(model=str(tiny_llama)), tmp_path / "out", cache=tmp_path / "cache"
    )
    link = tmp_path / "out" / "model"
    assert link.is_symlink()
    assert Path(os.readlink(link)).is_absolute()
    assert LlamaForCausalLM.from_pretrained(link).num_parameters() == facts["parameters"]
    assert facts["sha256"] == open_checkpoint(tiny_llama).fingerprint()
    assert facts["shape"]["hidden_size"] == 32
    json.dumps(facts)


def test_a_folder_is_held_against_the_expected_fingerprint(
    tiny_llama: Path, tmp_path: Path
) -> None:
    settings = TeacherSettings(model=str(tiny_llama), sha256="0" * 64)
    with pytest.raises(ShearlingError, match="not the expected model"):
        import_teacher(settings, tmp_path / "out", cache=tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such/folder/here", "neither a folder"),
        ("does-not-exist", "neither a folder"),
        ("nobody/does-not-exist", "not in the local hub cache"),
    ],
)
def test_a_teacher_that_is_nowhere(
    tmp_path: Path, model: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ShearlingError, match=message):
        import_teacher(TeacherSettings(model=model), tmp_path / "out", cache=tmp_path)


def test_a_single_file_that_is_no_gguf_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    settings = TeacherSettings(model=str(tiny_llama / "model.safetensors"))
    with pytest.raises(ShearlingError, match=r"no \.gguf file"):
        import_teacher(settings, tmp_path / "out", cache=tmp_path)


def test_a_hub_id_comes_out_of_the_local_hub_cache(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of the hub's cache: refs name a commit, snapshots link to blobs."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--sheep--tiny-llama"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "refs" / "v1").write_text(commit)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in tiny_llama.iterdir():
        shutil.copyfile(file, repo / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision in (None, "v1", commit):
        out = tmp_path / f"out-{revision}"
        settings = TeacherSettings(model="sheep/tiny-llama", revision=revision)
        facts = import_teacher(settings, out, cache=tmp_path)
        assert facts["format"] == "hub"
        assert facts["sha256"] == open_checkpoint(tiny_llama).fingerprint()
        assert facts["origin"] == {"base_model": "sheep/tiny-llama"}
    with pytest.raises(ShearlingError, match="sheep/tiny-llama"):
        import_teacher(
            TeacherSettings(model="sheep/tiny-llama", revision="v2"),
            tmp_path / "no",
            cache=tmp_path,
        )


def test_licence_and_card_are_fetched_from_the_hub(
    licensed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        snapshot = tmp_path / name / (revision or "main")
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in licensed.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, snapshot / file.name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    settings = TeacherSettings(model="sheep/tiny-llama")
    facts = import_teacher(settings, tmp_path / "out", cache=tmp_path)
    assert facts["origin"] == {**TERMS, "base_model": "sheep/tiny-llama"}
    assert (tmp_path / "out" / "model" / "USE_POLICY.md").read_text() == "Be kind."


@pytest.mark.parametrize("form", ["folder", "relative", "gguf", "gguf without a card"])
def test_a_licence_is_told_and_carried_along(licensed: Path, tmp_path: Path, form: str) -> None:
    model, base = licensed, "sheep/older-llama"
    if form == "relative":
        edit_config(licensed, model_type="mistral", architectures=["MistralForCausalLM"])
    elif "gguf" in form:
        settings = ExportSettings(to="gguf", dtype="float32")
        origin = {**TERMS, "base_model": base}
        export_checkpoint(licensed, tmp_path / "gguf", settings, name="x", origin=origin)
        model = tmp_path / "gguf" / "x-f32.gguf"
        assert (model.parent / "LICENSE").is_file()
        if form == "gguf":
            shutil.copyfile(licensed / "README.md", model.parent / "README.md")
    facts = import_teacher(TeacherSettings(model=str(model)), tmp_path / "out", cache=tmp_path)
    assert facts["origin"] == {**TERMS, "base_model": base}
    carried = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert ({"LICENSE", "USE_POLICY.md"} <= carried) == (form != "gguf without a card")
    # As a cut carries them on.
    copy_companions(tmp_path / "out" / "model", tmp_path / "student")
    assert (tmp_path / "student" / "LICENSE").is_file() == (form != "gguf without a card")


@pytest.mark.parametrize(
    "card",
    ["", "no front matter", "---\n- a list\n---\n", "---\na: [\n---\n", b"---\n\xff\n---\n"],
)
def test_a_card_that_says_nothing_is_no_origin(copy: Path, card: str | bytes) -> None:
    (copy / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    assert card_origin(copy) == {}
    (copy / "README.md").write_text("---\nlicense: [mit, 3]\nbase_model: [a/b, c/d]\n---\n")
    assert card_origin(copy) == {"base_model": ["a/b", "c/d"]}


def test_teachers_of_earlier_versions_are_asked_anew(licensed: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(licensed)
    record = {"summary": {"source": "sheep/tiny-llama", "format": "hub"}}
    (tmp_path / "stage.json").write_text(json.dumps(record))
    assert origin_of(tmp_path) == {**TERMS, "base_model": "sheep/tiny-llama"}
    record["summary"]["format"] = "folder"
    (tmp_path / "stage.json").write_text(json.dumps(record))
    assert origin_of(tmp_path) == {**TERMS, "base_model": "sheep/older-llama"}


def test_a_teacher_without_tokenizer_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ShearlingError, match="no tokenizer"):
        import_teacher(TeacherSettings(model=str(copy)), tmp_path / "out", cache=tmp_path)


# --- tokenizers travel ---


@pytest.mark.parametrize(
    "where", ["tokenizers/llama2", "tokenizers/llama3", "models/stories260K/hf"]
)
def test_a_copied_tokenizer_gives_the_same_ids(
    shared_data: Path, tmp_path: Path, nasty: list[str], where: str
) -> None:
    copy_tokenizer(shared_data / where, tmp_path)
    ours, theirs = load_tokenizer(tmp_path), load_tokenizer(shared_data / where)
    for text in nasty:
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_chat_template_and_special_tokens_travel_in_every_form_they_have(
    shared_data: Path, tmp_path: Path, nasty: list[str]
) -> None:
    """A template of its own or in the configuration; tokens that were added later."""
    source = Path(shutil.copytree(shared_data / "tokenizers/llama3", tmp_path / "source"))
    tokenizer = load_tokenizer(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|woolly|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content }}<|eot_id|>{% endfor %}"
    )
    tokenizer.save_pretrained(source)
    conversation = [{"role": "user", "content": "How is the wool?"}]
    for form in ("file", "configuration"):
        if form == "configuration":
            template = (source / "chat_template.jinja").read_text()
            (source / "chat_template.jinja").unlink()
            path = source / "tokenizer_config.json"
            data = json.loads(path.read_text())
            path.write_text(json.dumps({**data, "chat_template": template}))
        copy_tokenizer(source, tmp_path / form)
        ours, theirs = load_tokenizer(tmp_path / form), load_tokenizer(source)
        assert ours.convert_tokens_to_ids("<|woolly|>") == 128_256
        said = ours.apply_chat_template(conversation, tokenize=False)
        assert said == theirs.apply_chat_template(conversation, tokenize=False)
        assert said.endswith("How is the wool?<|eot_id|>")
        for text in [*nasty, f"{said}<|woolly|>"]:
            assert ours(text).input_ids == theirs(text).input_ids


def test_stories260k_opens(shared_data: Path) -> None:
    checkpoint = open_checkpoint(shared_data / "models/stories260K/hf")
    assert checkpoint.shape.num_key_value_heads == 4
    assert Checkpoint(checkpoint.folder).shape == checkpoint.shape
