"""Facts of every Llama generation: shapes, tokenizers, RoPE, context, how they were trained.

Nothing here loads torch. Parameter counts are the published ones (the safetensors totals of the
Hugging Face releases, or what the released shape gives); tests compute them from the shapes.

The model list in PyPI llama-models==0.3.0 agrees for Llama 3 to 3.3 and is an oracle of the tests,
as is litgpt's (PyPI litgpt==0.5.11), which also has Llama 2 and Code Llama as they were released.
The Llama 2 entries of the first are copies of Llama 3's (grouped attention and RoPE base 500000 for
the 7B) and contradict the released checkpoints, so they are not followed.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from shearling import ShearlingError
from students.shape import Shape

LLAMA_1 = "https://arxiv.org/abs/2302.13971"
LLAMA_2 = "https://arxiv.org/abs/2307.09288"
CODE_LLAMA = "https://arxiv.org/abs/2308.12950"
LLAMA_3 = "https://arxiv.org/abs/2407.21783"
LLAMA_3_CARD = "https://github.com/meta-llama/llama-models/blob/main/models/llama3/MODEL_CARD.md"
LLAMA_3_2_CARD = (
    "https://github.com/meta-llama/llama-models/blob/main/models/llama3_2/MODEL_CARD.md"
)
LLAMA_3_3_CARD = (
    "https://github.com/meta-llama/llama-models/blob/main/models/llama3_3/MODEL_CARD.md"
)
LLAMA_3_2_VISION_CARD = (
    "https://github.com/meta-llama/llama-models/blob/main/models/llama3_2/MODEL_CARD_VISION.md"
)
SMOLLM2 = "https://arxiv.org/abs/2502.02737"

SENTENCEPIECE = "SentencePiece BPE, digits split, byte fallback"
TIKTOKEN = "tiktoken BPE, up to three digits together"
BYTE_LEVEL = "byte-level BPE, digits split"


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How a generation was pre-trained, as far as it was published; None is unpublished."""

    name: str
    betas: tuple[float, float] | None = (0.9, 0.95)
    epsilon: float | None = None
    weight_decay: float | None = None
    gradient_clip: float | None = None
    warmup_steps: int
    schedule: str = "cosine"
    final_learning_rate_ratio: float
    batch_tokens: int | None
    source: str


# Llama 3's paper gives the 405B's run (8e-5 down to 8e-7 after 8,000 steps of warm-up) and the
# other sizes' peaks in its table 3.
TRAINING_RECIPES: dict[str, TrainingRecipe] = {
    recipe.name: recipe
    for recipe in (
        TrainingRecipe(
            name="llama-1",
            weight_decay=0.1,
            gradient_clip=1.0,
            warmup_steps=2000,
            final_learning_rate_ratio=0.1,
            batch_tokens=4_000_000,
            source=f"{LLAMA_1} section 2.3",
        ),
        TrainingRecipe(
            name="llama-2",
            epsilon=1e-5,
            weight_decay=0.1,
            gradient_clip=1.0,
            warmup_steps=2000,
            final_learning_rate_ratio=0.1,
            batch_tokens=4_000_000,
            source=f"{LLAMA_2} section 2.2",
        ),
        TrainingRecipe(
            name="code-llama",
            warmup_steps=1000,
            final_learning_rate_ratio=1 / 30,
            batch_tokens=4_000_000,
            source=f"{CODE_LLAMA} section 2.6",
        ),
        TrainingRecipe(
            name="llama-3",
            betas=None,
            warmup_steps=8000,
            final_learning_rate_ratio=0.01,
            batch_tokens=16_000_000,
            source=f"{LLAMA_3} section 3.4.1",
        ),
        TrainingRecipe(
            name="smollm2",
            warmup_steps=2000,
            schedule="warm-up, constant, linear to zero",
            final_learning_rate_ratio=0.0,
            batch_tokens=2_000_000,
            source=f"{SMOLLM2} sections 4.1 and 6",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One size of one generation.

    For a model with vision, shape and parameters are those of its text tower: what remains when
    the cross-attention layers are left out.
    """

    name: str
    title: str
    shape: Shape
    parameters: int
    context: int
    rope_base: float
    rope_factor: float | None = None
    norm_epsilon: float
    tokenizer: str
    training: str | None
    learning_rate: float | None
    vision: bool = False
    sources: tuple[str, ...]

    @property
    def grouped_attention(self) -> bool:
        return self.shape.num_key_value_heads < self.shape.num_attention_heads

    def rope_parameters(self) -> dict[str, Any]:
        """As in a Hugging Face ``config.json``. All scaled Llamas share the same bounds."""
        if self.rope_factor is None:
            return {"rope_type": "default", "rope_theta": self.rope_base}
        return {
            "rope_type": "llama3",
            "rope_theta": self.rope_base,
            "factor": self.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }

    def config(self) -> dict[str, Any]:
        """Arguments for a ``LlamaConfig`` of this model."""
        return {
            **self.shape.to_dict(),
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_epsilon,
            "rope_parameters": self.rope_parameters(),
        }


def _shape(
    hidden: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    ffn: int,
    vocabulary: int,
    *,
    head_dim: int = 128,
    tied: bool = False,
) -> Shape:
    return Shape(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        intermediate_size=ffn,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


_7B = _shape(4096, 32, 32, 32, 11008, 32000)
_13B = _shape(5120, 40, 40, 40, 13824, 32000)
_33B = _shape(6656, 60, 52, 52, 17920, 32000)
_65B = _shape(8192, 80, 64, 64, 22016, 32000)
_34B = _shape(8192, 48, 64, 8, 22016, 32000)
_70B = _shape(8192, 80, 64, 8, 28672, 32000)
_8B_3 = _shape(4096, 32, 32, 8, 14336, 128256)
_70B_3 = _shape(8192, 80, 64, 8, 28672, 128256)
_405B_3 = _shape(16384, 126, 128, 8, 53248, 128256)
_1B_3 = _shape(2048, 16, 32, 8, 8192, 128256, head_dim=64, tied=True)
_3B_3 = _shape(3072, 28, 24, 8, 8192, 128256, tied=True)


def _llama_1(size: str, shape: Shape, parameters: int, rate: float, epsilon: float) -> Family:
    return Family(
        name=f"llama-1-{size.lower()}",
        title=f"Llama 1 {size}",
        shape=shape,
        parameters=parameters,
        context=2048,
        rope_base=10_000.0,
        norm_epsilon=epsilon,
        tokenizer=SENTENCEPIECE,
        training="llama-1",
        learning_rate=rate,
        sources=(LLAMA_1, f"https://huggingface.co/huggyllama/llama-{_huggy(size)}"),
    )


def _huggy(size: str) -> str:
    return {"33B": "30b"}.get(size, size.lower())


def _llama_2(size: str, shape: Shape, parameters: int, rate: float) -> Family:
    # The 34B was described but not released; its shape is Code Llama 34B's, which began from it.
    released = f"https://huggingface.co/meta-llama/Llama-2-{size.lower()}-hf"
    return Family(
        name=f"llama-2-{size.lower()}",
        title=f"Llama 2 {size}",
        shape=shape,
        parameters=parameters,
        context=4096,
        rope_base=10_000.0,
        norm_epsilon=1e-5,
        tokenizer=SENTENCEPIECE,
        training="llama-2",
        learning_rate=rate,
        sources=(LLAMA_2, CODE_LLAMA if size == "34B" else released),
    )


def _code_llama(size: str, shape: Shape, parameters: int, rate: float) -> Family:
    # The sizes that fill in the middle have four more tokens, padded to 32,016; the 34B doesn't.
    # These are the base models: 70B Instruct and Python keep Llama 2's RoPE base and context
    # (https://github.com/meta-llama/codellama/issues/188), 7B and 13B Python its vocabulary.
    vocabulary = 32000 if size == "34B" else 32016
    return Family(
        name=f"code-llama-{size.lower()}",
        title=f"Code Llama {size}",
        shape=replace(shape, vocab_size=vocabulary),
        parameters=parameters,
        context=16384,
        rope_base=1_000_000.0,
        norm_epsilon=1e-5,
        tokenizer=SENTENCEPIECE,
        training="code-llama",
        learning_rate=rate,
        sources=(CODE_LLAMA, f"https://huggingface.co/codellama/CodeLlama-{size.lower()}-hf"),
    )


def _llama_3(
    generation: str,
    size: str,
    shape: Shape,
    parameters: int,
    *,
    rate: float | None,
    sources: tuple[str, ...],
    factor: float | None = None,
    vision: bool = False,
) -> Family:
    ending = "-vision" if vision else ""
    return Family(
        name=f"llama-{generation}-{size.lower()}{ending}",
        title=f"Llama {generation} {size}{' Vision (text tower)' if vision else ''}",
        shape=shape,
        parameters=parameters,
        context=8192 if factor is None else 131_072,
        rope_base=500_000.0,
        rope_factor=factor,
        norm_epsilon=1e-5,
        tokenizer=TIKTOKEN,
        training=None if rate is None else "llama-3",
        learning_rate=rate,
        vision=vision,
        sources=sources,
    )


_SMOLLM2 = Family(
    name="smollm2-135m",
    title="SmolLM2 135M",
    shape=_shape(576, 30, 9, 3, 1536, 49152, head_dim=64, tied=True),
    parameters=134_515_008,
    context=8192,
    rope_base=100_000.0,
    norm_epsilon=1e-5,
    tokenizer=BYTE_LEVEL,
    training="smollm2",
    learning_rate=3e-3,
    sources=(SMOLLM2, "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"),
)

# Llama 3.2's 1B and 3B were pruned and distilled from 3.1's 8B and 70B; with which learning rate
# was not published. The vision models' text weights are those of 3.1's 8B and 70B.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _llama_1("7B", _7B, 6_738_415_616, 3e-4, 1e-6),
        _llama_1("13B", _13B, 13_015_864_320, 3e-4, 1e-6),
        _llama_1("33B", _33B, 32_528_943_616, 1.5e-4, 1e-6),
        _llama_1("65B", _65B, 65_285_660_672, 1.5e-4, 1e-5),
        _llama_2("7B", _7B, 6_738_415_616, 3e-4),
        _llama_2("13B", _13B, 13_015_864_320, 3e-4),
        _llama_2("34B", _34B, 33_743_970_304, 1.5e-4),
        _llama_2("70B", _70B, 68_976_648_192, 1.5e-4),
        _code_llama("7B", _7B, 6_738_546_688, 3e-4),
        _code_llama("13B", _13B, 13_016_028_160, 3e-4),
        _code_llama("34B", _34B, 33_743_970_304, 1.5e-4),
        _code_llama("70B", _70B, 68_976_910_336, 1e-4),
        _llama_3("3", "8B", _8B_3, 8_030_261_248, rate=3e-4, sources=(LLAMA_3_CARD, LLAMA_3)),
        _llama_3("3", "70B", _70B_3, 70_553_706_496, rate=1.5e-4, sources=(LLAMA_3_CARD, LLAMA_3)),
        _llama_3("3.1", "8B", _8B_3, 8_030_261_248, rate=3e-4, factor=8.0, sources=(LLAMA_3,)),
        _llama_3("3.1", "70B", _70B_3, 70_553_706_496, rate=1.5e-4, factor=8.0, sources=(LLAMA_3,)),
        _llama_3(
            "3.1", "405B", _405B_3, 405_853_388_800, rate=8e-5, factor=8.0, sources=(LLAMA_3,)
        ),
        _llama_3(
            "3.2", "1B", _1B_3, 1_235_814_400, rate=None, factor=32.0, sources=(LLAMA_3_2_CARD,)
        ),
        _llama_3(
            "3.2", "3B", _3B_3, 3_212_749_824, rate=None, factor=32.0, sources=(LLAMA_3_2_CARD,)
        ),
        _llama_3(
            "3.2",
            "11B",
            _8B_3,
            8_030_261_248,
            rate=None,
            factor=8.0,
            vision=True,
            sources=(LLAMA_3_2_VISION_CARD,),
        ),
        _llama_3(
            "3.2",
            "90B",
            _70B_3,
            70_553_706_496,
            rate=None,
            factor=8.0,
            vision=True,
            sources=(LLAMA_3_2_VISION_CARD,),
        ),
        _llama_3(
            "3.3", "70B", _70B_3, 70_553_706_496, rate=None, factor=8.0, sources=(LLAMA_3_3_CARD,)
        ),
        _SMOLLM2,
    )
}


def family(name: str) -> Family:
    """The family of this name, or a ShearlingError with the nearest one."""
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        raise ShearlingError(
            f"There is no Llama named {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""),
            hint=f"Known are: {', '.join(FAMILIES)}.",
        )
    return FAMILIES[name]


_SIZE = r"(\d+)b"
_NAMES: tuple[tuple[str, str], ...] = (
    # What a model's name looks like, once in lower case with "-" for "_", and the family's name.
    (rf"code-?llama-{_SIZE}", "code-llama-{0}b"),
    (r"llama-?(3\.2)-(11|90)b(?:-vision)?", "llama-{0}-{1}b-vision"),
    (rf"llama-?(3(?:\.[123])?)-{_SIZE}", "llama-{0}-{1}b"),
    (rf"llama-?2-{_SIZE}", "llama-2-{0}b"),
    (rf"llama-(?:1-)?{_SIZE}", "llama-1-{0}b"),
    (r"smollm2-(135)m", "smollm2-{0}m"),
)


def known_family(reference: str) -> Family | None:
    """The family behind a hub id, a folder's or a file's name; None where the name tells none.

    ``meta-llama/Llama-3.1-8B-Instruct``, ``huggyllama/llama-30b``, ``./Llama-2-7b-hf``. A name is
    a claim, not a fact: good enough to plan with before there are files to look into.
    """
    name = reference.rstrip("/").rpartition("/")[2].lower().replace("_", "-")
    name = name.replace("-30b", "-33b")  # Llama 1's 33B is called 30B on the hub
    if "code" in name and "python" in name:
        return None  # neither Code Llama's vocabulary nor, as the 70B, its context
    for pattern, known in _NAMES:
        if match := re.search(rf"(?:^|[^a-z]|meta-){pattern}(?![0-9a-z])", name):
            return FAMILIES.get(known.format(*match.groups()))
    return None


def training_recipe(name: str) -> tuple[TrainingRecipe, float | None]:
    """A published training recipe by its own name or a model's, and that model's learning rate.

    Raises:
        ShearlingError: no such name, or a model whose training was not published.
    """
    if name in TRAINING_RECIPES:
        return TRAINING_RECIPES[name], None
    known = FAMILIES.get(name)
    if known is None or known.training is None:
        names = [*TRAINING_RECIPES, *(f.name for f in FAMILIES.values() if f.training)]
        near = difflib.get_close_matches(name, names, n=1)
        raise ShearlingError(
            f"No training recipe {name!r} was published."
            + (f" Did you mean {near[0]!r}?" if near else ""),
            hint=f"Known are: {', '.join(names)}.",
        )
    return TRAINING_RECIPES[known.training], known.learning_rate


def training_table() -> list[dict[str, Any]]:
    """One row a published training recipe."""
    return [asdict(recipe) for recipe in TRAINING_RECIPES.values()]


def families_table() -> list[dict[str, Any]]:
    """One row a model, in the order of the generations, for the command line and the docs."""
    return [
        {
            "name": f.name,
            "title": f.title,
            "parameters": f.parameters,
            "layers": f.shape.num_hidden_layers,
            "hidden": f.shape.hidden_size,
            "heads": f.shape.num_attention_heads,
            "key_value_heads": f.shape.num_key_value_heads,
            "head_dim": f.shape.head_dim,
            "intermediate": f.shape.intermediate_size,
            "vocabulary": f.shape.vocab_size,
            "tied": f.shape.tie_word_embeddings,
            "context": f.context,
            "rope_base": f.rope_base,
            "rope_scaling": f.rope_factor,
            "norm_epsilon": f.norm_epsilon,
            "tokenizer": f.tokenizer,
            "training": f.training,
            "learning_rate": f.learning_rate,
            "sources": list(f.sources),
        }
        for f in FAMILIES.values()
    ]
