"""What each stage costs: memory, disk, floating-point operations, as formulas of shapes.

Nothing here, in ``estimate_prune`` and in ``estimate_distill`` loads torch or opens a model. The
formulas follow the code of ``compress`` and are held against it by the tests: operations against
PyTorch's own counter, activations against what autograd keeps, peaks against the resident memory
of small runs.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from pipelines.cost import Cost, Moment, Writing
from reports.settings import BenchmarkSettings
from students.gguf_layout import stored_kind
from students.settings import ExportSettings
from students.shape import Shape
from teachers.settings import WrittenSettings

SHARD = 2 * 1024**3  # of a teacher that is being written


def import_cost(shape: Shape, form: str, dtype_bytes: int) -> Cost:
    """Bring a teacher in: ``folder`` is linked, ``hub`` downloaded, others converted by shards."""
    converted = form in ("gguf", "meta", "mllama", "relative")
    width = 4 if form == "gguf" else dtype_bytes
    size = float(shape.parameters * width)
    largest = 4.0 * shape.vocab_size * shape.hidden_size
    memory = {"one tensor": largest, "a shard": min(size, SHARD) if converted else 0.0}
    stays = 0.0 if form == "folder" else size
    return Cost(
        moments=(Moment(what="import", device={}, host=memory),),
        disk=stays,
        moved=size + (stays if converted else 0.0),
    )


def transfer_set_cost(tokens: int, vocabulary: int) -> Cost:
    """Tokenise and pack: two bytes a token, or four where the vocabulary needs them."""
    size = float(tokens * (2 if vocabulary <= 1 << 16 else 4))
    # Tokenising does no matrix products; its rate stands in `plan.TOKENISING`.
    return Cost(
        moments=(Moment(what="tokenise", device={}, host={"text": 0.3e9}),),
        disk=size,
        scratch=4.0 * tokens,
        tokens=tokens,
        moved=2 * size,
    )


def written_cost(
    packing: Cost, shape: Shape, settings: WrittenSettings, *, length: int, width: int
) -> Cost:
    """``packing``, and the writing of what the teacher writes itself in numbers of ``width`` bytes.

    All documents are taken to reach ``length``, the greatest. Keys and values count three times:
    read for the attention, and copied by transformers' growing cache.
    """
    documents = -(-settings.tokens // length)
    rounds = -(-documents // settings.batch)
    steps = rounds * length
    per_token = shape.key_value_bytes_per_token(width)
    keys_and_values = float(settings.batch * length * per_token)
    held = {
        "teacher": float(width * shape.parameters),
        "keys and values": 2.0 * keys_and_values,  # the old ones and their longer copy
        "logits": 3.0 * 4 * settings.batch * shape.vocab_size,
    }
    return replace(
        packing,
        moments=(*packing.moments, Moment(what="write", device=held)),
        scratch=packing.scratch + 4.0 * rounds * settings.batch * length,
        moved=packing.moved + width * shape.parameters,
        writing=Writing(
            tokens=settings.tokens,
            layer_steps=float(steps * shape.num_hidden_layers),
            flops=steps * settings.batch * shape.flops_per_token(length),
            bytes=steps * (width * shape.parameters + 3.0 * keys_and_values / 2),
        ),
    )


# Documents of a task's test split, and about how many tokens one of them costs when the choices'
# shared beginning is read once. Counted with SmolLM2's tokenizer, rounded.
TASKS: dict[str, tuple[int, int]] = {
    "arc_challenge": (1172, 80),
    "arc_easy": (2376, 70),
    "boolq": (3270, 160),
    "cloze_leads": (1500, 60),
    "copa": (100, 30),
    "grammar_pairs": (1000, 40),
    "gsm8k": (1319, 1200),
    "hellaswag": (10042, 170),
    "lambada_openai": (5153, 90),
    "lastword": (1000, 70),
    "mmlu": (14042, 160),
    "openbookqa": (500, 50),
    "piqa": (1838, 90),
    "social_iqa": (1954, 60),
    "truthfulqa_mc2": (817, 200),
    "wikitext2": (62, 4700),
    "winogrande": (1267, 50),
}
UNKNOWN_TASK = (1000, 150)
PERPLEXITY_WINDOW = 512


EXPORT_BITS = {
    **{"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5},
    **{"q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5},
}
"""Bits of a weight, the scales of its block among them."""


def benchmark_tokens(settings: BenchmarkSettings) -> int:
    """About how many tokens a benchmark puts through a model."""
    total = len(settings.prompts) * settings.completion_tokens
    for task in settings.tasks:
        documents, each = TASKS.get(task, UNKNOWN_TASK)
        limit = settings.limits.get(task, settings.limit)
        total += min(documents, limit or documents) * each
    if "wikitext2" in settings.tasks:
        lengths = settings.perplexity_lengths
        total += sum(length * settings.windows_of(length) for length in lengths)
    return total


def benchmark_cost(
    shape: Shape, settings: BenchmarkSettings, *, dtype_bytes: int, on_cpu: bool
) -> Cost:
    """The model and a batch; float32 on a CPU. One process: tasks are not divided."""
    width = 4 if on_cpu else dtype_bytes
    tokens = benchmark_tokens(settings)
    batch = max(settings.batch_size * PERPLEXITY_WINDOW, *settings.perplexity_lengths)
    held = {
        "model": float(width * shape.parameters),
        "activations": float(batch * 4 * (2 * shape.intermediate_size + 4 * shape.hidden_size)),
        "logits": 4.0 * PERPLEXITY_WINDOW * shape.vocab_size,
    }
    # Measuring speed loads the model again in a process of its own.
    runs = 2 if settings.speed else 1
    return Cost(
        moments=(Moment(what="tasks", device=held),),
        flops={"float32" if on_cpu else "product": tokens * shape.flops_per_token(256)},
        tokens=tokens,
        moved=float(runs * dtype_bytes * shape.parameters),
    )


def export_cost(shape: Shape, settings: ExportSettings, dtype_bytes: int) -> Cost:
    """One tensor in memory (and a shard, for a folder); bits a weight as the form has them."""
    from teachers.layout import expected_tensors  # brings torch

    largest = 4.0 * shape.vocab_size * shape.hidden_size
    kind = settings.gguf_kind()
    size = shape.parameters * EXPORT_BITS[kind] / 8
    if settings.to == "gguf":
        size = sum(
            prod(sizes) * EXPORT_BITS[stored_kind(name, sizes, kind)] / 8
            for name, sizes in expected_tensors(shape).items()
        )
    shard = min(size, SHARD) if settings.to == "hf" else 0.0
    return Cost(
        moments=(
            Moment(what="export", device={}, host={"one tensor": 3 * largest, "a shard": shard}),
        ),
        disk=size,
        moved=size + dtype_bytes * shape.parameters,
    )
