"""What tensors a stock ``LlamaForCausalLM`` consists of, whatever the file they come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from students.shape import Shape

_SHOWN = 8  # names in one error message


def expected_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a stock ``LlamaForCausalLM`` of this shape.

    ``lm_head.weight`` is left out where it is tied to the embeddings. Linear weights are
    [out, in].
    """
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, shape.attention_bias),
        "self_attn.k_proj": (keys, hidden, shape.attention_bias),
        "self_attn.v_proj": (keys, hidden, shape.attention_bias),
        "self_attn.o_proj": (hidden, queries, shape.attention_bias),
        "mlp.gate_proj": (ffn, hidden, shape.mlp_bias),
        "mlp.up_proj": (ffn, hidden, shape.mlp_bias),
        "mlp.down_proj": (hidden, ffn, shape.mlp_bias),
    }
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape.tie_word_embeddings:
        tensors["lm_head.weight"] = (shape.vocab_size, hidden)
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = (hidden,)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, (out, inp, bias) in linears.items():
            tensors[f"{prefix}.{name}.weight"] = (out, inp)
            if bias:
                tensors[f"{prefix}.{name}.bias"] = (out,)
    return tensors


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def tensor_problems(shape: Shape, found: Mapping[str, tuple[int, ...]], told_by: str) -> list[str]:
    """What is missing or of another shape than ``shape`` needs, one sentence each.

    ``found`` maps Hugging Face names to shapes; ``told_by`` says who promised the shape.
    """
    if shape.num_hidden_layers > len(found):  # before a list of a trillion layers is made
        return [f"{told_by} {shape.num_hidden_layers:,} layers, there are {len(found):,} tensors"]
    expected = expected_tensors(shape)
    problems = []
    missing = [name for name in expected if name not in found]
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {listed(missing)}")
    problems += [
        f"{name} has shape {list(found[name])}, {told_by} {list(wanted)}"
        for name, wanted in expected.items()
        if name in found and found[name] != wanted
    ][:_SHOWN]
    return problems


def halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix (or bias) from Meta's rotary layout to Hugging Face's.

    Meta's files and GGUF keep the two numbers of a RoPE pair beside each other, Hugging Face
    half a head apart. [heads * head_dim, ...] -> the same shape.
    """
    half = rows.shape[0] // heads // 2
    pairs = rows.reshape(heads, half, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
