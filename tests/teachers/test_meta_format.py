"""Meta's own format, against Meta's own arithmetic and against transformers' own conversion."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import AutoTokenizer, LlamaForCausalLM

from shearling import ShearlingError
from teachers.checkpoint import import_teacher, open_checkpoint
from teachers.fetch import fetch
from teachers.meta_tokenizer import meta_tokenizer
from teachers.settings import TeacherSettings

VOCABULARY = 512
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "norm_eps": 1e-5}
GROUPED = {**PARAMS, "n_heads": 16, "rope_theta": 500000.0, "vocab_size": VOCABULARY}
FFN = 96


def release_weights(params: dict[str, Any], *, tied: bool = False) -> dict[str, Tensor]:
    """Random weights under Meta's names and in Meta's layout."""
    torch.manual_seed(0)
    dim, head_dim = params["dim"], params["dim"] // params["n_heads"]
    keys = head_dim * params["n_kv_heads"]
    shapes = {
        "attention.wq": (dim, dim),
        "attention.wk": (keys, dim),
        "attention.wv": (keys, dim),
        "attention.wo": (dim, dim),
        "feed_forward.w1": (FFN, dim),
        "feed_forward.w2": (dim, FFN),
        "feed_forward.w3": (FFN, dim),
    }
    weights = {
        f"layers.{layer}.{name}.weight": torch.randn(shape) * 0.3
        for layer in range(params["n_layers"])
        for name, shape in shapes.items()
    }
    for layer in range(params["n_layers"]):
        for norm in ("attention_norm", "ffn_norm"):
            weights[f"layers.{layer}.{norm}.weight"] = torch.rand(dim) + 0.5
    weights["norm.weight"] = torch.rand(dim) + 0.5
    weights["tok_embeddings.weight"] = torch.randn(VOCABULARY, dim)
    weights["output.weight"] = torch.randn(VOCABULARY, dim)
    if tied:
        weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    return weights


def metas_logits(weights: dict[str, Tensor], params: dict[str, Any], ids: Tensor) -> Tensor:
    """The forward pass of Meta's model.py: RoPE as complex numbers on neighbouring pairs."""
    heads, keys, eps = params["n_heads"], params["n_kv_heads"], params["norm_eps"]
    head_dim, time = params["dim"] // heads, ids.numel()
    base = params.get("rope_theta", 10000.0)
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(time).float(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(time, -1, head_dim // 2, 2))
        return torch.view_as_real(pairs * turn[:, None]).flatten(2)

    h = weights["tok_embeddings.weight"][ids]
    for layer in range(params["n_layers"]):
        w = {
            name.split(".", 2)[2].removesuffix(".weight"): tensor
            for name, tensor in weights.items()
            if name.startswith(f"layers.{layer}.")
        }
        x = norm(h, w["attention_norm"])
        q = rotate((x @ w["attention.wq"].T).view(time, heads, head_dim)).transpose(0, 1)
        k = rotate((x @ w["attention.wk"].T).view(time, keys, head_dim)).transpose(0, 1)
        v = (x @ w["attention.wv"].T).view(time, keys, head_dim).transpose(0, 1)
        k, v = (t.repeat_interleave(heads // keys, 0) for t in (k, v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + mixed.transpose(0, 1).reshape(time, -1) @ w["attention.wo"].T
        x = norm(h, w["ffn_norm"])
        gate = silu(x @ w["feed_forward.w1"].T) * (x @ w["feed_forward.w3"].T)
        h = h + gate @ w["feed_forward.w2"].T
    return norm(h, weights["norm.weight"]) @ weights["output.weight"].T


def cut(name: str, tensor: Tensor, part: int, parts: int, *, by_rows: bool) -> Tensor:
    """What fairscale's layers leave on one GPU."""
    if tensor.dim() == 1:
        return tensor
    columns = name.endswith((".wo.weight", ".w2.weight"))
    if name.endswith("tok_embeddings.weight"):
        columns = not by_rows
    return tensor.chunk(parts, 1 if columns else 0)[part].clone()


def write_release(
    folder: Path,
    tokenizer: Path,
    params: dict[str, Any],
    weights: dict[str, Tensor],
    *,
    parts: int = 1,
    by_rows: bool = True,
) -> Path:
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    for part in range(parts):
        state = {n: cut(n, t, part, parts, by_rows=by_rows) for n, t in weights.items()}
        state["rope.freqs"] = torch.ones(4)
        torch.save(state, folder / f"consolidated.{part:02d}.pth")
    return folder


@pytest.fixture(scope="module")
def tok512(shared_data: Path) -> Path:
    """A real SentencePiece model with 512 tokens."""
    return shared_data / "models/stories260K/tok512.model"


def imported(folder: Path, out: Path) -> LlamaForCausalLM:
    facts = import_teacher(TeacherSettings(model=str(folder)), out, cache=out / "cache")
    assert facts["format"] == "meta"
    return open_checkpoint(out / "model").model(torch.float32)


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("params", [PARAMS, GROUPED], ids=["llama-2", "llama-3"])
def test_the_converted_release_has_metas_logits(
    tok512: Path, tmp_path: Path, parts: int, params: dict[str, Any]
) -> None:
    weights, ids = release_weights(params), torch.randint(0, VOCABULARY, (40,))
    folder = write_release(
        tmp_path / "meta", tok512, params, weights, parts=parts, by_rows=params is GROUPED
    )
    model = imported(folder, tmp_path / "out")
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    torch.testing.assert_close(ours, metas_logits(weights, params, ids), rtol=1e-4, atol=1e-4)
    assert model.config.num_key_value_heads == params["n_kv_heads"]
    assert not model.config.tie_word_embeddings


# --- transformers' own conversion ---


@pytest.fixture(scope="module")
def conversion(real_cache: Path) -> Any:
    """The script in transformers 4.47.1; later wheels leave it out."""
    name = "transformers/models/llama/convert_llama_weights_to_hf.py"
    known = "d11a220cda7c675c47f44f5e403f326000d26cfc5285d75312067c84da86b5fd"
    try:
        path = fetch(f"pypi:transformers==4.47.1/{name}", sha256=known, cache=real_cache)
    except ShearlingError as error:
        pytest.skip(f"transformers 4.47.1 can't be had: {error.what}")
    spec = importlib.util.spec_from_file_location("transformers_conversion", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATIONS = {  # the script's word for it: Meta's parameters, how the embedding is cut
    "1": ({key: value for key, value in PARAMS.items() if key != "n_kv_heads"}, False),
    "2": (PARAMS, False),
    "3": (GROUPED, True),
    "3.1": ({**GROUPED, "use_scaled_rope": True}, True),
}


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("version", GENERATIONS)
def test_the_logits_are_those_of_transformers_own_conversion(
    conversion: Any, tok512: Path, tmp_path: Path, version: str, parts: int
) -> None:
    params, by_rows = GENERATIONS[version]
    params = {**params, "multiple_of": 32, "ffn_dim_multiplier": 0.5}
    assert conversion.compute_intermediate_size(64, 0.5, 32) == FFN
    weights = {n: t.bfloat16() for n, t in release_weights({"n_kv_heads": 8, **params}).items()}
    folder = write_release(tmp_path / "meta", tok512, params, weights, parts=parts, by_rows=by_rows)
    conversion.write_model(
        str(tmp_path / "theirs"),
        str(folder),
        llama_version=version,
        vocab_size=VOCABULARY,
        num_shards=parts,
    )
    ours = imported(folder, tmp_path / "out")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    ids = torch.randint(0, VOCABULARY, (1, 200))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    for key in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "head_dim"):
        assert getattr(ours.config, key) == getattr(theirs.config, key), key


@pytest.mark.parametrize("parts", [1, 8])
def test_the_text_tower_of_a_vision_release(tok512: Path, tmp_path: Path, parts: int) -> None:
    """What the release has besides the text is left alone; the 11B's one file has no number."""
    params = {**GROUPED, "use_scaled_rope": True}
    text = release_weights(params)
    plain = imported(write_release(tmp_path / "plain", tok512, params, text), tmp_path / "a")
    weights = {f"text_model.{name}": tensor for name, tensor in text.items()}
    weights |= {
        "text_model.learnable_embedding.weight": torch.randn(8, 64),
        "text_model.cross_attention_layers.0.attention.wq.weight": torch.randn(64, 64),
        "text_model.cross_attention_layers.0.gate_attn": torch.randn(1),
        "vision_model.vision_encoder.conv1._linear.weight": torch.randn(16, 16),
    }
    params |= {"vision_chunk_size": 448, "vision_num_cross_attention_layers": 1}
    folder = write_release(tmp_path / "meta", tok512, params, weights, parts=parts)
    if parts == 1:
        (folder / "consolidated.00.pth").rename(folder / "consolidated.pth")
    model = imported(folder, tmp_path / "out")
    ids = torch.randint(0, VOCABULARY, (1, 40))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    configs = [(tmp_path / each / "model/config.json").read_text() for each in ("out", "a")]
    assert configs[0] == configs[1]


def test_parameters_under_model_are_found(tok512: Path, tmp_path: Path) -> None:
    folder = write_release(tmp_path / "meta", tok512, PARAMS, release_weights(PARAMS))
    (folder / "params.json").write_text(json.dumps({"model": PARAMS}))
    assert imported(folder, tmp_path / "out").config.hidden_size == 64


def test_a_tied_release_is_seen_and_stored_once(tok512: Path, tmp_path: Path) -> None:
    weights = release_weights(PARAMS, tied=True)
    folder = write_release(tmp_path / "meta", tok512, PARAMS, weights, parts=2)
    model = imported(folder, tmp_path / "out")
    assert model.config.tie_word_embeddings
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "out/model").weights.infos


def test_the_dtype_is_kept(tok512: Path, tmp_path: Path) -> None:
    weights = {n: t.bfloat16() for n, t in release_weights(PARAMS).items()}
    folder = write_release(tmp_path / "meta", tok512, PARAMS, weights, parts=2)
    imported(folder, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out/model").dtype == "BF16"


def test_scaled_rope_becomes_llama3s(tok512: Path, tmp_path: Path) -> None:
    params = {**GROUPED, "use_scaled_rope": True}
    folder = write_release(tmp_path / "meta", tok512, params, release_weights(params))
    config = imported(folder, tmp_path / "out").config
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["factor"] == 8.0
    assert config.max_position_embeddings == 131_072


def _remove_part(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()


def _remove_last_part(folder: Path) -> None:
    (folder / "consolidated.01.pth").unlink()


def _truncate(folder: Path) -> None:
    file = folder / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:-200])


def _params(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "params.json").write_text(json.dumps({**PARAMS, **changes}))

    return spoil


def _remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_remove_part, r"lacks the parts consolidated\.00\.pth"),
        (_remove_last_part, "has shape"),
        (_truncate, "can't be read"),
        (_params(moe_args={"n": 8}), "mixture of experts"),
        (_params(vision_chunk_size=448, dim=32), "has shape"),
        (_params(dim=0), "lacks dim"),
        (_params(n_layers=3), "tensors are missing"),
        (_params(n_layers=10**12), "layers"),
        (_params(dim="wide"), r"params\.json makes no sense"),
        (_params(norm_eps="small"), r"params\.json makes no sense"),
        (_remove_tokenizer, r"no tokenizer\.model"),
    ],
)
def test_a_damaged_release_is_refused(
    tok512: Path, tmp_path: Path, spoil: Callable[[Path], None], named: str
) -> None:
    folder = write_release(tmp_path / "a/meta", tok512, PARAMS, release_weights(PARAMS), parts=2)
    spoil(folder)
    with pytest.raises(ShearlingError, match=named):
        import_teacher(TeacherSettings(model=str(folder)), tmp_path / "out", cache=tmp_path)


# --- tokenizers, against the tokenizer.json beside them ---


@pytest.mark.parametrize("where", ["tokenizers/llama2", "tokenizers/llama3"])
def test_tokenizer_model_gives_the_ids_of_tokenizer_json(
    shared_data: Path, nasty: list[str], where: str
) -> None:
    folder = shared_data / where
    ours, theirs = meta_tokenizer(folder, newer=False), AutoTokenizer.from_pretrained(folder)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in nasty:
        if where.endswith("llama2") and ("  " in text or text.startswith(" ")):
            continue  # that tokenizer.json ranks runs of spaces wrongly; see below
        plain = theirs(text, add_special_tokens=False).input_ids
        assert ours(text, add_special_tokens=False).input_ids == plain, text
        assert ours(text).input_ids[0] == ours.bos_token_id


# Computed with the sentencepiece library 0.2 from the same tokenizer.model: runs of spaces have
# the lowest score, so that "    return" is three spaces and " return".
SENTENCEPIECE_IDS = {
    "def f(x):\n    return {'a'}": [
        822,
        285,
        29898,
        29916,
        1125,
        13,
        1678,
        736,
        11117,
        29874,
        10827,
    ],
    "a  12\n\n1. one\n  2. two\t3\r\n4": [
        *(263, 259, 29896, 29906, 13, 13, 29896, 29889, 697, 13, 259, 29906, 29889, 1023, 12),
        *(29941, 30004, 13, 29946),
    ],
    "   leading and trailing   \n\n   \u00a0\u2003\u200b end ": [
        *(1678, 8236, 322, 25053, 1678, 13, 13, 259, 20246, 30363, 30166, 1095, 29871),
    ],
}


@pytest.mark.parametrize("text", SENTENCEPIECE_IDS)
def test_runs_of_spaces_are_split_as_sentencepiece_does(shared_data: Path, text: str) -> None:
    tokenizer = meta_tokenizer(shared_data / "tokenizers/llama2", newer=False)
    assert tokenizer(text, add_special_tokens=False).input_ids == SENTENCEPIECE_IDS[text]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


# tokenizer.model files that anyone can have from PyPI, and ids that the libraries that they were
# made for give (sentencepiece 0.2.3, tiktoken 0.14.0 with Llama 3's pattern).
TEXTS = (
    "In 2023, 1234567 sheep 🐑: x**2\n\t美洲驼  a",
    "def f(x):\n    return {'a'}",
    b"caf\xe9 \xff".decode("utf-8", errors="replace"),
)
PUBLISHED = {
    "pypi:llama-models==0.3.0/llama_models/llama3/tokenizer.model": (
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
        128_256,
        (
            [
                *(644, 220, 2366, 18, 11, 220, 4513, 10961, 22, 33012, 11410, 238, 239, 25, 865),
                *(334, 17, 198, 197, 58666, 102776, 77180, 120, 220, 264),
            ],
            [755, 282, 2120, 997, 262, 471, 5473, 64, 8439],
            [69896, 5809, 30433],
        ),
    ),
    "pypi:mistral-common==1.13.1/mistral_common/data/tokenizer.model.v1": (
        "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
        32_000,
        (
            [
                *(560, 28705, 28750, 28734, 28750, 28770, 28725, 28705, 28740, 28750, 28770),
                *(28781, 28782, 28784, 28787, 19583, 28705, 243, 162, 147, 148, 28747, 1318, 348),
                *(28750, 13, 12, 29817, 31564, 236, 172, 191, 28705, 264),
            ],
            [801, 285, 28732, 28744, 1329, 13, 2287, 604, 12012, 28708, 14491],
            [18302, 29137, 28705, 29137],
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED, ids=["llama-models", "mistral-common"])
def test_published_tokenizers_give_the_ids_of_their_own_libraries(
    name: str, real_cache: Path, tmp_path: Path
) -> None:
    sha256, tokens, ids = PUBLISHED[name]
    try:
        path = fetch(name, sha256=sha256, cache=real_cache)
    except ShearlingError as error:
        pytest.skip(f"it can't be had: {error.what}")
    shutil.copyfile(path, tmp_path / "tokenizer.model")
    tokenizer = meta_tokenizer(tmp_path, newer=False)
    assert len(tokenizer) == tokens
    for text, wanted in zip(TEXTS, ids, strict=True):
        assert tokenizer(text, add_special_tokens=False).input_ids == wanted
        assert tokenizer.decode(wanted) == text


def test_llama_3_1_names_its_special_tokens(shared_data: Path) -> None:
    tokenizer = meta_tokenizer(shared_data / "tokenizers/llama3", newer=True)
    expected = {
        128000: "<|begin_of_text|>",
        128004: "<|finetune_right_pad_id|>",
        128005: "<|reserved_special_token_2|>",
        128008: "<|eom_id|>",
        128009: "<|eot_id|>",
        128010: "<|python_tag|>",
        128011: "<|reserved_special_token_3|>",
        128255: "<|reserved_special_token_247|>",
    }
    assert {i: tokenizer.convert_ids_to_tokens(i) for i in expected} == expected
    assert len(tokenizer) == 128256


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\n\x05\n\x01a",
        b"IQ== 0\nnonsense\n",
        b"IQ== 0\nIg== 7\n",
        struct.pack("<QQ", 2**63, 2**63),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ShearlingError):
        meta_tokenizer(tmp_path, newer=False)
