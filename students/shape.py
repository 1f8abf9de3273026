"""Shape: the numbers that fix a Llama's parameters, and the arithmetic on them.

Nothing here loads torch: a recipe is checked and planned from shapes alone.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from shearling import ShearlingError, itemised

WIDTH_STEP = 8  # widths of proportional shapes are multiples of this, as matrix kernels like them


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama's dimensions. ``parameters`` counts tied embeddings once.

    ``head_dim`` is the width of one attention head; queries are
    ``num_attention_heads * head_dim`` wide, keys and values ``num_key_value_heads * head_dim``.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Read the shape out of a ``LlamaConfig`` or of the dict in a ``config.json``."""
        get: Callable[[str], Any] = (
            config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
        )
        missing = [n for n in _NEEDED if get(n) is None]
        if missing:
            raise ShearlingError(
                f"The model's config.json lacks {', '.join(missing)}.",
                hint="Is this the folder of a Llama-family model? It should hold config.json.",
            )
        heads = int(get("num_attention_heads"))
        return cls(
            hidden_size=int(get("hidden_size")),
            num_hidden_layers=int(get("num_hidden_layers")),
            num_attention_heads=heads,
            num_key_value_heads=int(get("num_key_value_heads") or heads),
            head_dim=int(get("head_dim") or int(get("hidden_size")) // heads),
            intermediate_size=int(get("intermediate_size")),
            vocab_size=int(get("vocab_size")),
            tie_word_embeddings=bool(get("tie_word_embeddings")),
            attention_bias=bool(get("attention_bias")),
            mlp_bias=bool(get("mlp_bias")),
        )

    def to_dict(self) -> dict[str, int | bool]:
        return asdict(self)

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head (1 without grouped attention)."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, its two norms included."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.key_value_size)
        ffn = 3 * self.hidden_size * self.intermediate_size
        biases = 0
        if self.attention_bias:
            biases += self.query_size + 2 * self.key_value_size + self.hidden_size
        if self.mlp_bias:
            biases += 2 * self.intermediate_size + self.hidden_size
        return attention + ffn + biases + 2 * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        layers = self.num_hidden_layers * self.layer_parameters
        return self.embedding_parameters + layers + self.hidden_size

    @property
    def non_embedding_parameters(self) -> int:
        return self.parameters - self.embedding_parameters

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of one token's forward pass at ``context`` tokens before it.

        Two for each weight that is multiplied (the output head included, the embedding lookup
        not), and two each for scores and mixing over half the context on average.
        """
        layers = self.num_hidden_layers
        matrices = layers * (self.layer_parameters - 2 * self.hidden_size)
        head = self.vocab_size * self.hidden_size
        attention = layers * 2 * self.query_size * (context / 2)
        return 2.0 * (matrices + head + attention)

    def key_value_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Memory of the key/value cache for one token."""
        return 2 * self.num_hidden_layers * self.key_value_size * bytes_per_value

    def internal_problems(self) -> list[str]:
        """What makes this shape impossible for any Llama, one sentence each."""
        problems = [
            f"{name} is {value}; it must be at least 1"
            for name, value in asdict(self).items()
            if not isinstance(value, bool) and value < 1
        ]
        if problems:
            return problems
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; transformers refuses such a Llama"
            )
        if self.head_dim % 2:
            problems.append(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        return problems

    def merges_ends_of(self, teacher: Shape) -> bool:
        """Whether one matrix serves where the teacher has an embedding and an output head."""
        return self.tie_word_embeddings and not teacher.tie_word_embeddings

    def problems_as_student_of(self, teacher: Shape) -> list[str]:
        """What keeps this shape from being cut out of ``teacher``, one sentence each."""
        problems = self.internal_problems()
        for name in _SHRINKABLE:
            mine, theirs = getattr(self, name), getattr(teacher, name)
            if mine > theirs:
                problems.append(f"{name} {mine} is larger than the teacher's {theirs}")
        if self.vocab_size != teacher.vocab_size:
            problems.append(
                f"vocab_size {self.vocab_size} differs from the teacher's {teacher.vocab_size}; "
                "the vocabulary is kept"
            )
        for name in ("attention_bias", "mlp_bias"):
            if getattr(teacher, name) and not getattr(self, name):
                problems.append(f"{name} false would drop biases that the teacher has")
            if getattr(self, name) and not getattr(teacher, name):
                problems.append(f"{name} true would add biases that the teacher lacks")
        if self.head_dim > 0 and teacher.head_dim % self.head_dim:
            problems.append(
                f"head_dim {self.head_dim} does not divide the teacher's {teacher.head_dim}, so "
                "its rotary frequencies would not be those of a stock model"
            )
        if teacher.tie_word_embeddings and not self.tie_word_embeddings:
            problems.append(
                "tie_word_embeddings false would spend parameters that the tied teacher lacks"
            )
        if not problems and self.group_size > teacher.group_size:
            problems.append(
                f"{self.num_attention_heads} query heads over {self.num_key_value_heads} "
                f"key/value heads are {self.group_size} a group; the teacher has only "
                f"{teacher.group_size} a group"
            )
        return problems


_NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
_SHRINKABLE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)


def _round_to(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)


def round_hidden(value: float, heads: int, largest: int) -> int:
    """A hidden size near ``value`` that divides among the heads, and by 8 if there is one."""
    best = _round_to(value, math.lcm(WIDTH_STEP, heads))
    return best if best <= largest else _round_to(value, heads)


def _proportional(
    teacher: Shape, *, hidden: float, layers: float, group: float, head_dim: float, ffn: float
) -> Shape:
    """Scale a teacher's axes; query heads shrink inside their groups, so the division holds.

    Without grouped attention there is no group to thin out: query and key/value heads go together.
    """
    if teacher.group_size > 1:
        key_value_heads = teacher.num_key_value_heads
        heads = key_value_heads * max(1, int(teacher.group_size * group))
    else:
        key_value_heads = heads = max(1, round(teacher.num_key_value_heads * group))
    return replace(
        teacher,
        hidden_size=round_hidden(teacher.hidden_size * hidden, heads, teacher.hidden_size),
        num_hidden_layers=max(1, int(teacher.num_hidden_layers * layers)),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=max(2, int(teacher.head_dim * head_dim) // 2 * 2),
        intermediate_size=min(
            teacher.intermediate_size, _round_to(teacher.intermediate_size * ffn, WIDTH_STEP)
        ),
        tie_word_embeddings=True,
    )


def _exactly(**axes: Any) -> Callable[[Shape], Shape]:
    """A shape of published numbers; what they leave out stays as the teacher has it."""
    return lambda teacher: replace(teacher, **axes)


def _widths(hidden: int, layers: int, heads: int, key_value_heads: int, ffn: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": ffn,
    }


def _like_3b(teacher: Shape) -> Shape:
    """The proportions of Llama 3.1 8B to Llama 3.2 3B."""
    return _proportional(teacher, hidden=0.75, layers=0.875, group=0.75, head_dim=1, ffn=4 / 7)


def _like_1b(teacher: Shape) -> Shape:
    """The proportions of Llama 3.1 8B to Llama 3.2 1B: all heads stay, at half their width."""
    return _proportional(teacher, hidden=0.5, layers=0.5, group=1, head_dim=0.5, ffn=4 / 7)


# Sheared-LLaMA: https://arxiv.org/abs/2310.06694, table 1 (out of Llama 2 7B).
# Minitron: https://arxiv.org/abs/2408.11796, table 3 (out of Llama 3.1 8B).
PRESETS: dict[str, Callable[[Shape], Shape]] = {
    "llama-3.2-3b": _exactly(
        **_widths(3072, 28, 24, 8, 8192), head_dim=128, tie_word_embeddings=True
    ),
    "llama-3.2-1b": _exactly(
        **_widths(2048, 16, 32, 8, 8192), head_dim=64, tie_word_embeddings=True
    ),
    "llama-3.1-8b": _exactly(**_widths(4096, 32, 32, 8, 14336), head_dim=128),
    "llama-3.1-70b": _exactly(**_widths(8192, 80, 64, 8, 28672), head_dim=128),
    "sheared-llama-2.7b": _exactly(**_widths(2560, 32, 20, 20, 6912), head_dim=128),
    "sheared-llama-1.3b": _exactly(**_widths(2048, 24, 16, 16, 5504), head_dim=128),
    "minitron-4b-width": _exactly(**_widths(3072, 32, 32, 8, 9216), head_dim=128),
    "minitron-4b-depth": _exactly(**_widths(4096, 16, 32, 8, 14336), head_dim=128),
    "like-3b": _like_3b,
    "like-1b": _like_1b,
}


def resolve_shape(spec: str | Mapping[str, Any], teacher: Shape) -> Shape:
    """The student's full shape from a preset's name or from the axes that differ.

    Raises:
        ShearlingError: with every problem of the shape at once.
    """
    shape = _from_preset(spec, teacher) if isinstance(spec, str) else _from_axes(spec, teacher)
    problems = shape.problems_as_student_of(teacher)
    if problems:
        raise ShearlingError(
            itemised("The student's shape does not fit the teacher:", problems),
            hint="Change `shape` in the recipe's prune stage. The teacher has: "
            + ", ".join(f"{name} {getattr(teacher, name)}" for name in _SHRINKABLE)
            + ".",
        )
    return shape


def _from_preset(name: str, teacher: Shape) -> Shape:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise ShearlingError(
            f"There is no shape named {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""),
            hint=f"Shapes by name: {', '.join(PRESETS)}; or give the axes (hidden_size: ...).",
        )
    return PRESETS[name](teacher)


def _from_axes(axes: Mapping[str, Any], teacher: Shape) -> Shape:
    known = {field.name: field.type for field in fields(Shape)}
    problems = []
    for name, value in axes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(
                f"shape has no axis {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        elif known[name] == "bool" and not isinstance(value, bool):
            problems.append(f"{name} must be true or false, not {value!r}")
        elif known[name] == "int" and (isinstance(value, bool) or not isinstance(value, int)):
            problems.append(f"{name} must be a whole number, not {value!r}")
    if problems:
        raise ShearlingError(
            itemised("The student's shape can't be read:", problems),
            hint=f"Axes of a shape: {', '.join(known)}.",
        )
    return replace(teacher, **axes)
