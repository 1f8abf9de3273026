"""What each stage costs: memory, disk, floating-point operations, as formulas of shapes.

Nothing here loads torch or opens a model. The formulas follow the code of ``compress`` and are
held against it by the tests: operations against PyTorch's own counter, activations against what
autograd keeps, peaks against the resident memory of small runs.

Legend of the comments: N positions, T positions of a window, V vocabulary, E teacher hidden,
D student hidden, Q query rows, K key/value rows, F neurons, s bytes of a product's numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from compress.settings import DistillSettings, PruneSettings
from reports.settings import BenchmarkSettings
from students.gguf_layout import stored_kind
from students.settings import ExportSettings
from students.shape import Shape
from teachers.settings import WrittenSettings

LIBRARIES = 0.5e9
"""A process with torch, transformers and lm-eval loaded, before any model (measured)."""
SHARD = 2 * 1024**3  # of a teacher that is being written
STUDENT_SHARD = 512 * 1024**2
SURVEY_TOKENS, GREEDY_TOKENS, FINAL_POSITIONS, WALK_BATCH_TOKENS = 16384, 32768, 4096, 4096
DEPTH_TOKENS, TAYLOR_TOKENS, METRIC_CHUNK, SOLVED_OUTPUTS = 2048, 8192, 512, 2048
OPENING_EVERY, HEAD_POSITIONS = 32, 512
"""As in compress.survey, .layer, .depth, .taylor, .ends and .reconstruct."""
RIDGES, JUDGED_OUTPUTS, GRAM_ROWS = 3, 700, 1024
"""Ridges tried for a map: the one of the layer before and its neighbours; about how many outputs
judge them; rows of a Gram matrix in one product (compress.reconstruct)."""
MICRO_TOKENS = 1024  # as in compress.data
LOGIT_POSITIONS = 512  # as in compress.answers
BLOCK_BYTES = 8 * 2**20  # as in compress.fused
DIFFERENTIATED = {
    "forward_kl": 8.25,
    "reverse_kl": 3.25,
    "jensen_shannon": 7.5,
    "skewed_kl": 6.25,
    "skewed_reverse_kl": 6.25,
}
"""Float32 numbers a logit that autograd keeps or makes for a term of the loss; the first, which is
always there, with both models' logits and the cross-entropy. Measured with PyTorch's profiler, as
the tests do again. Their sum is up to a tenth too much: not all terms are at their peak at once."""
SHORT_WINDOW = 1024  # as in compress.attention
ATTENTION_BLOCK = 128
MASK = 1.0  # bytes of an entry of the mask, T² of them a window, as it is made
NARROW = "weights in the products' dtype"
HELDOUT, SAVED = "held-out answers", "a part of the checkpoint"
SHARDED = frozenset(
    {"weights", "gradients", "optimizer", "average", "teacher", NARROW, HELDOUT, SAVED}
)
"""What is divided among processes, most of it by FSDP; the rest each process has for itself, the
layers too that are gathered just now."""
GATHERED, ENDS = "gathered student", "gathered embeddings"
"""What only the first process has; and what each of several has whole, where a single one has it
among its weights."""

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
Bytes = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What is in memory at one moment of a stage, in bytes: on the device, and beside it.

    On a CPU both are one memory.
    """

    what: str
    device: Bytes
    host: Bytes = field(default_factory=dict)
    split: bool | None = None
    """Whether it comes with several processes only, with one only, or (None) with any number."""

    def device_bytes(self, processes: int = 1) -> float:
        return sum(share_of(self.device, processes).values())

    def host_bytes(self, processes: int = 1) -> float:
        return sum(share_of(self.host, processes).values()) + LIBRARIES

    def together_bytes(self, processes: int) -> float:
        """Of all processes, where they and their devices have one memory."""
        held = (share_of(self.device, processes), share_of(self.host, processes))
        sizes = (
            size if name == GATHERED else processes * size
            for part in held
            for name, size in part.items()
        )
        return sum(sizes) + processes * LIBRARIES


def share_of(held: Bytes, processes: int) -> dict[str, float]:
    """What one of the processes has of it."""
    return {
        name: size / processes if name in SHARDED else size
        for name, size in held.items()
        if name != ENDS or processes > 1
    }


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Text that a model writes, a token of each document a step.

    A step reads all weights and the keys and values so far, whatever it computes: mostly the
    memory decides how long it takes.
    """

    tokens: int
    layer_steps: float
    """Steps times layers: each is a few dozen calls of a library."""
    flops: float
    bytes: float
    """Read and written in the device's memory."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What a training writes while it works, and waits for."""

    bytes: float
    """Of a checkpoint."""
    every: float
    """Seconds between two of them."""
    steps: int
    best: float
    """Bytes of the weights that are kept as the best so far, if each evaluation is better."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A stage's needs. ``flops`` are by arithmetic: product (the fast dtype), float32, float64."""

    moments: tuple[Moment, ...]
    disk: float = 0.0
    """Bytes that stay."""
    cached: float = 0.0
    """Of these, what lies in the cache folder, for other runs too."""
    scratch: float = 0.0
    """Bytes on disk only while the stage runs."""
    flops: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    moved: float = 0.0
    """Bytes read from and written to disk."""
    writing: Writing | None = None
    """What a model writes besides; its operations are not among ``flops``."""
    product: str | None = None
    """The dtype of the products, where the stage says it."""
    most_processes: int = 1
    """That can share it."""
    saving: Saving | None = None
    """What it writes besides ``moved``."""

    def moments_of(self, processes: int) -> list[Moment]:
        """Those that come where so many share the stage."""
        return [m for m in self.moments if m.split is None or m.split == (processes > 1)]

    def worst(self, *, on_cpu: bool, processes: int = 1) -> Moment:
        """The moment that decides whether the stage fits."""
        return max(
            self.moments_of(processes),
            key=lambda m: m.device_bytes(processes) + (m.host_bytes(processes) if on_cpu else 0.0),
        )


def _trunk_flops(shape: Shape, window: int) -> float:
    """Of one position's forward pass without the output head."""
    return shape.flops_per_token(window) - 2.0 * shape.vocab_size * shape.hidden_size


# --- teacher, transfer set ----------------------------------------------------------------------


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


# --- prune --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """One least-squares problem of a layer: of ``maps``, with so many inputs and outputs.

    ``crossed`` is with what the inputs' products are added up: the wanted outputs, or, where maps
    read the stream (``mapped``), the teacher's stream, of which the outputs are made.
    """

    maps: str
    inputs: int
    outputs: int
    crossed: int
    mapped: bool = False

    def bytes(self) -> float:
        """At the solution: moments in float32, and in float64 the matrix, its factor, and some
        outputs; the search for a ridge has four squares in float32, which is less."""
        some = min(self.outputs, SOLVED_OUTPUTS)
        square, cross = self.inputs**2, self.inputs * self.crossed
        weights = self.inputs * self.outputs
        maps = self.crossed * self.outputs * self.mapped
        narrow = square + 2 * cross + weights * (2 if self.mapped else 1) + maps
        return 4.0 * narrow + 8.0 * (2 * square + 4 * self.inputs * some)


def _fits(before: Shape, student: Shape) -> list[_Fit]:
    """The least-squares problems of a layer."""
    hidden, queries, neurons = student.hidden_size, student.query_size, student.intermediate_size
    wide, read = before.hidden_size, queries + 2 * student.key_value_size
    return [
        _Fit(maps="qkv", inputs=hidden, outputs=read, crossed=wide, mapped=True),
        _Fit(maps="o_proj", inputs=queries, outputs=hidden, crossed=hidden),
        _Fit(maps="gate_up", inputs=hidden, outputs=2 * neurons, crossed=wide, mapped=True),
        _Fit(maps="down_proj", inputs=neurons, outputs=hidden, crossed=hidden),
    ]


def prune_cost(
    before: Shape,
    student: Shape,
    settings: PruneSettings,
    *,
    window: int,
    product: str,
    dtype_bytes: int,
) -> Cost:
    """The survey, the walk and the last check. ``before`` is the model that is cut."""
    greedy = settings.chosen_by == "greedy"
    survey = min(GREEDY_TOKENS if greedy else SURVEY_TOKENS, settings.calibration_tokens)
    tokens = settings.calibration_tokens if settings.refit else 0
    told = max(tokens, survey)
    survey, tokens = survey + openings(survey, window), tokens + openings(tokens, window)
    vocabulary, wide, narrow = student.vocab_size, before.hidden_size, student.hidden_size
    table = float(student.embedding_parameters)
    streams = float(tokens * (wide + narrow)) * WIDTH[settings.stream_dtype]
    widest = max(student.query_size, student.intermediate_size)
    held = streams + float(tokens * widest * WIDTH[product])
    limit = settings.stream_memory_gb * 1024**3
    kept = {
        "embeddings": dtype_bytes * table,
        "residual streams": min(held, limit),
        "a shard": 1.0 * min(student.parameters * dtype_bytes, STUDENT_SHARD),
    }
    positions = min(WALK_BATCH_TOKENS, max(tokens, survey))
    activations = (
        4.0 * positions * (4 * before.intermediate_size + 6 * wide + 3 * before.query_size)
    )
    surveyed = {"teacher layer": 4.0 * before.layer_parameters, "activations": activations}
    if greedy:
        surveyed["Gram matrices"] = 4.0 * sum(size**2 for size, _ in _chosen(before, student))
    # The teacher's layer as it is stored, on a CPU as pages of its file; what is cut of it in
    # float32, sliced and refitted.
    walked = {
        "teacher layer": float(dtype_bytes * before.layer_parameters),
        "student layer": 8.0 * student.layer_parameters,
        "activations": activations,
    }
    cutting = {**walked, "teacher layer": (4.0 + dtype_bytes) * before.layer_parameters}
    # Logits of a chunk and their softmax; the metric of a wide head, in float32 and float64.
    metric = {
        "logits": 12.0 * METRIC_CHUNK * vocabulary,
        "metric": 12.0 * narrow * (wide + narrow),
    }
    # A layer and the output head in float32; the rest is mapped from the student's files.
    check = {"student": 4.0 * (student.layer_parameters + vocabulary * narrow)}
    moments = [
        Moment(what="survey", device=surveyed, host={"residual streams": 4.0 * survey * wide}),
        *_choice_moments(before, student, settings, surveyed, survey),
        Moment(what="start", device=metric, host={"embeddings": (4.0 + dtype_bytes) * table}),
        Moment(what="cut of a layer", device=cutting, host=kept),
        Moment(what="check", device=check, host=kept),
    ]
    if settings.refit:
        moments += [
            Moment(
                what=f"fit of {fit.maps}",
                device={**walked, "Gram matrices": fit.bytes()},
                host=kept,
            )
            for fit in _fits(before, student)
        ]
    return Cost(
        moments=tuple(moments),
        disk=float(student.parameters * dtype_bytes),
        scratch=2 * streams + max(0.0, held - limit),  # a checkpoint is whole before the old goes
        flops=_prune_flops(before, student, settings, tokens, survey, window),
        tokens=told,
        product=product,
        moved=float(2 * before.parameters + 2 * student.parameters) * dtype_bytes
        + dtype_bytes * _choice_reads(before, student, settings),
    )


def openings(tokens: int, window: int) -> int:
    """Windows of one token that pass the layers beside so many tokens of long ones."""
    return -(-tokens // window) * -(-window // OPENING_EVERY)


def search_cost(
    before: Shape,
    shapes: Sequence[Shape],
    settings: PruneSettings,
    *,
    tokens: int,
    window: int,
    heldout_windows: int,
    product: str,
    dtype_bytes: int,
) -> Cost:
    """Each shape pruned on ``tokens`` tokens and scored; then the costliest of them in full."""

    def pruned(shape: Shape, settings: PruneSettings) -> Cost:
        return prune_cost(
            before, shape, settings, window=window, product=product, dtype_bytes=dtype_bytes
        )

    few = min(tokens, settings.calibration_tokens)
    cheap = settings.model_copy(update={"calibration_tokens": few})
    tries = [pruned(shape, cheap) for shape in shapes]
    final = max(
        (pruned(shape, settings) for shape in shapes), key=lambda cost: sum(cost.flops.values())
    )
    read = min(heldout_windows, max(1, tokens // window)) * window
    asked = sum(read * shape.flops_per_token(window) for shape in (before, *shapes))
    # Its head answers beside each student's, not once.
    heads = read * 2.0 * before.vocab_size * before.hidden_size * (len(shapes) - 1)
    flops = {
        name: sum(cost.flops.get(name, 0.0) for cost in (final, *tries)) for name in final.flops
    }
    wide, widest = before.hidden_size, max(shape.hidden_size for shape in shapes)
    scoring = Moment(
        what="score",
        device={
            "teacher layer": 4.0 * before.layer_parameters,
            "output heads": 1.0
            * WIDTH[product]
            * before.vocab_size
            * (before.hidden_size + widest),
        },
        host={"residual streams": 4.0 * read * (wide + 2 * widest)},
    )
    return Cost(
        moments=(*final.moments, *(moment for cost in tries for moment in cost.moments), scoring),
        disk=final.disk,
        scratch=max(cost.disk for cost in tries),
        flops={**flops, "product": flops["product"] + asked + heads},
        tokens=final.tokens + sum(cost.tokens for cost in tries),
        moved=sum(cost.moved for cost in (final, *tries)),
    )


def _chosen(before: Shape, student: Shape) -> list[tuple[int, int]]:
    """Sizes, before and after, of the output maps' inputs that are cut by heads or neurons."""
    sizes = [
        (before.intermediate_size, student.intermediate_size),
        (before.query_size, student.num_attention_heads * before.head_dim),
    ]
    return [(inputs, left) for inputs, left in sizes if left < inputs]


def _choice_moments(
    before: Shape,
    student: Shape,
    settings: PruneSettings,
    layers: dict[str, float],
    survey: int,
) -> list[Moment]:
    """What choosing needs beside a layer: Gram matrices and what is made of them, streams."""
    moments = []
    head = float(before.vocab_size * before.hidden_size)
    chosen = _chosen(before, student)
    if settings.chosen_by == "greedy" and chosen:
        largest = max(size for size, _ in chosen)
        removal = 16.0 * largest**2 + 8.0 * before.hidden_size * largest
        idle = {**layers, "activations": 0.0}
        stream = {"residual streams": 4.0 * survey * before.hidden_size}
        moments.append(
            Moment(what="greedy choice", device={**idle, "removal": removal}, host=stream)
        )
    if settings.chosen_by == "taylor":
        streams = (before.num_hidden_layers + 2.0) * min(survey, TAYLOR_TOKENS)
        streams *= WIDTH[settings.stream_dtype] * before.hidden_size
        moments.append(
            Moment(
                what="gradients",
                device={
                    **layers,
                    "graph": 2 * layers["activations"],
                    "output head": 4 * head,
                    "logits": 16.0 * HEAD_POSITIONS * before.vocab_size,
                },
                host={"streams": min(streams, settings.stream_memory_gb * 1024**3)},
            )
        )
    if _dropped(before, student) and settings.depth == "divergence":
        candidates = (before.num_hidden_layers + 1) * min(survey, DEPTH_TOKENS)
        moments.append(
            Moment(
                what="depth",
                device={**layers, "output head": 4 * head},
                host={"a stream for each layer": 4.0 * candidates * before.hidden_size},
            )
        )
    if settings.basis_for(before, student) == "principal":
        basis = {"principal directions": 40.0 * before.hidden_size**2}
        moments.append(Moment(what="basis", device={}, host=basis))
    if student.merges_ends_of(before) and settings.merge == "least_squares":
        both = {"joint directions": 20.0 * (2 * before.hidden_size) ** 2}
        merged = {"embeddings": 4.0 * student.vocab_size * student.hidden_size}
        moments.append(Moment(what="merge", device=both, host=merged))
    return moments


def _dropped(before: Shape, student: Shape) -> int:
    return before.num_hidden_layers - student.num_hidden_layers


def _choice_reads(before: Shape, student: Shape, settings: PruneSettings) -> float:
    """Weights of the teacher that are read more often than the survey and the walk read them."""
    reads = 2.0 * (settings.chosen_by == "taylor")
    if settings.depth == "divergence":
        reads += _dropped(before, student)
    return reads * before.parameters


def _choice_flops(
    before: Shape, student: Shape, settings: PruneSettings, survey: int, window: int
) -> dict[str, float]:
    """The floating-point operations of ``_choice_moments``, by dtype."""
    layers, wide = before.num_hidden_layers, before.hidden_size
    single, double, products = 0.0, 0.0, 0.0
    if settings.chosen_by == "taylor":  # forward; for gradients forward again and twice back
        products += 4.0 * min(survey, TAYLOR_TOKENS) * _trunk_flops(before, window)
    if settings.depth == "divergence":
        # Every layer that is left takes the whole stream and those without each one before it.
        lefts = range(student.num_hidden_layers + 1, layers + 1)
        passes = sum(left * (left + 1) / 2 for left in lefts)
        heads = sum(left + 1 for left in lefts)
        products += min(survey, DEPTH_TOKENS) * passes / layers * _trunk_flops(before, window)
        products += 4.0 * min(survey, DEPTH_TOKENS) * heads * before.vocab_size * wide
    if settings.chosen_by == "greedy":
        for inputs, left in _chosen(before, student):
            single += layers * survey * inputs * (inputs + min(inputs, GRAM_ROWS))
            removal = 2.0 * (inputs - left) * inputs * (inputs + wide)
            double += layers * (inputs**3 + removal)
    if settings.basis_for(before, student) == "principal":
        narrow = student.hidden_size
        single += 2.0 * layers * survey * wide * (wide + min(wide, GRAM_ROWS))
        single += 2.0 * narrow * student.num_hidden_layers * before.layer_parameters
        single += 2.0 * before.vocab_size * wide * narrow
        double += 10.0 * wide**3 + 20.0 * narrow**3  # all eigenvectors, one SVD
    if student.merges_ends_of(before) and settings.merge == "least_squares":
        single += 4.0 * before.vocab_size * wide * (wide + student.hidden_size)
        single += 10.0 * (2 * wide) ** 3
    return {"product": products, "float32": single, "float64": double}


def _prune_flops(
    before: Shape,
    student: Shape,
    settings: PruneSettings,
    tokens: int,
    survey: int,
    window: int,
) -> dict[str, float]:
    chosen = _choice_flops(before, student, settings, survey, window)
    products = chosen["product"] + survey * _trunk_flops(before, window)
    products += tokens * (_trunk_flops(before, window) + _trunk_flops(student, window))
    layers, single, double = student.num_hidden_layers, chosen["float32"], chosen["float64"]
    # Output maps once more, sliced, for what each position counts.
    outputs = student.query_size + student.intermediate_size
    products += 2.0 * tokens * layers * outputs * student.hidden_size
    for fit in _fits(before, student) if tokens else ():
        inputs, outputs = fit.inputs, fit.outputs
        gram = inputs * (inputs + min(inputs, GRAM_ROWS)) / 2  # blocks below the diagonal
        single += 2.0 * layers * tokens * (gram + inputs * fit.crossed)
        single += 2.0 * layers * inputs * fit.crossed * outputs * fit.mapped
        # Cholesky, and the error of each solution
        judged = min(outputs, JUDGED_OUTPUTS)
        single += layers * RIDGES * (inputs**3 / 3 + 4.0 * inputs**2 * judged)
        double += layers * (inputs**3 / 3 + 4.0 * inputs**2 * outputs)
    # The metric of the output head, on the final states that are kept, and its map.
    wide, narrow = before.hidden_size, student.hidden_size
    final = min(survey, FINAL_POSITIONS)
    products += 2.0 * final * student.vocab_size * (2 * wide + narrow)
    single += 2.0 * student.vocab_size * narrow * (wide + narrow)
    double += narrow**3 / 3 + 2.0 * narrow**2 * wide
    if tokens:
        single += 2.0 * tokens * narrow * (wide + narrow)
    return {"product": products, "float32": single, "float64": double}


# --- distill ------------------------------------------------------------------------------------


def activation_bytes(shape: Shape, window: int, product: str, *, on_cpu: bool) -> float:
    """What autograd keeps of one position in one layer, without checkpointing.

    Two norms keep their inputs in float32 and what they give in the products' dtype, the MLP gate,
    up and their product. The CPU's attention for short windows keeps queries, keys, values, what it
    gives, and the probabilities, T numbers a head but for what lies ahead of a block. PyTorch's
    keeps the mask that holds documents apart, T numbers, which is most of it in long windows.
    """
    width = WIDTH[product]
    others = (8.0 + 2.0 * width) * shape.hidden_size + 3.0 * width * shape.intermediate_size
    if on_cpu and product == "bfloat16" and window <= SHORT_WINDOW:
        heads = 2.0 * (shape.query_size + shape.key_value_size)
        seen = min(window, (window + ATTENTION_BLOCK) / 2)
        return others + width * (heads + shape.num_attention_heads * seen)
    return others + width * (4.0 * shape.query_size + window)


def answer_bytes(shape: Shape, window: int, product: str) -> float:
    """What a position of a forward pass without gradients needs in its widest layer."""
    width = WIDTH[product]
    numbers = 3 * shape.intermediate_size + 4 * shape.hidden_size + 2 * shape.query_size
    return 1.0 * width * (numbers + window) + MASK * window


def loss_bytes(
    settings: DistillSettings,
    teachers: int,
    *,
    chunk: int,
    vocabulary: int,
    product: str,
    on_cpu: bool,
) -> float:
    """Logits in float32, and what the loss makes of them: of a chunk, on a CPU of a block of it.

    The forward KL is differentiated by hand, but for labels beside another temperature than 1.
    """
    rows = min(chunk, max(1, BLOCK_BYTES // (4 * vocabulary))) if on_cpu else chunk
    live = settings.targets == "live" and teachers > 0
    others = [name for name in DIFFERENTIATED if name != "forward_kl" and getattr(settings, name)]
    if not live:
        copies = 1.0
    elif others or (settings.temperature != 1 and settings.cross_entropy):
        copies = sum(DIFFERENTIATED[name] for name in ("forward_kl", *others))
    else:
        copies = 3.0 if settings.temperature == 1 else 4.0
    mixed, wide = live and teachers > 1, product == "float32"
    if wide:  # the logits need no wider copy; a mixture is one of its own
        copies -= 2.0 if live and not mixed else 1.0
    mixing = (3.0 if wide else 4.0) * chunk if mixed else 0.0  # before the first block
    return 4.0 * vocabulary * max(rows * copies, mixing)


def optimizer_bytes(shape: Shape, kind: str) -> float:
    """Float32 state: two numbers a weight with AdamW; Muon keeps one for the layers' matrices."""
    if kind != "muon":
        return 8.0 * shape.parameters
    norms = 2 * shape.hidden_size
    matrices = shape.num_hidden_layers * (shape.layer_parameters - norms)
    return 4.0 * matrices + 8.0 * (shape.parameters - matrices)


def _muon_flops(shape: Shape) -> float:
    """Of one optimizer step: three polynomials (`compress.muon`) of each matrix of each layer."""
    hidden, neurons = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.query_size, shape.key_value_size
    sizes = [(queries, hidden)] * 2 + [(keys, hidden)] * 2 + [(neurons, hidden)] * 3
    rounds = (3.0 * (4.0 * min(size) ** 2 * max(size) + 2.0 * min(size) ** 3) for size in sizes)
    return shape.num_hidden_layers * sum(rounds)


def steps_of(settings: DistillSettings, window: int) -> tuple[int, int]:
    """Optimizer steps, and tokens of one of them, as ``compress.data`` counts them."""
    step_windows = max(1, round(settings.batch_tokens / window))
    step_tokens = step_windows * window
    return max(1, round(settings.tokens / step_tokens)), step_tokens


def distill_cost(
    teachers: Iterable[Shape],
    student: Shape,
    settings: DistillSettings,
    *,
    window: int,
    heldout_windows: int,
    distinct_tokens: int,
    product: str,
    dtype_bytes: int,
    on_cpu: bool,
) -> Cost:
    """Training steps, evaluations, and the capture of targets where they are kept."""
    teachers = tuple(teachers)
    steps, step_tokens = steps_of(settings, window)
    by_default = max(1, MICRO_TOKENS // window)
    micro = min(settings.micro_batch_windows or by_default, step_tokens // window) * window
    live = settings.targets == "live"
    width, parameters, vocabulary = WIDTH[product], student.parameters, student.vocab_size
    tables = [float(vocabulary * shape.hidden_size) for shape in (student, *teachers)]
    layer = activation_bytes(student, window, product, on_cpu=on_cpu)
    if settings.gradient_checkpointing:
        activations = micro * (student.num_hidden_layers * 4.0 * student.hidden_size + layer)
    else:
        activations = micro * student.num_hidden_layers * layer
    narrow_weights = 0.0 if product == "float32" else float(width * parameters)
    chunk = min(settings.chunk_tokens, micro)
    held = {
        "weights": 4.0 * parameters,
        "gradients": 4.0 * parameters,
        "optimizer": optimizer_bytes(student, settings.optimizer),
        "teacher": sum(float(width * t.parameters) for t in teachers) if live else 0.0,
        "teacher's output head": 0.0 if live else width * sum(tables[1:]),
        "average": 4.0 * parameters if settings.ema else 0.0,
        NARROW: narrow_weights,
        "gathered layers": 2.0 * width * max(s.layer_parameters for s in (student, *teachers)),
        ENDS: 4.0 * student.embedding_parameters
        + sum(1.0 * width * t.embedding_parameters for t in teachers if live),
        "activations": activations,
        "mask": MASK * micro * window,
        "logits": chunk * vocabulary * (2.0 * width) + 4.0 * tables[0] + width * sum(tables),
        "blocks of logits": loss_bytes(
            settings,
            len(teachers),
            chunk=chunk,
            vocabulary=vocabulary,
            product=product,
            on_cpu=on_cpu,
        ),
    }
    asked = float(heldout_windows * window * width * sum(t.hidden_size for t in teachers))
    kept = {HELDOUT: asked}
    moments = [
        Moment(what="step", device={name: size for name, size in held.items() if size}, host=kept)
    ]
    if live and teachers:
        answering = micro * max(answer_bytes(each, window, product) for each in teachers)
        during = held | {"activations": answering, "mask": 0.0, "logits": 0.0}
        during["blocks of logits"] = 0.0
        moments.append(
            Moment(
                what="answer",
                device={name: size for name, size in during.items() if size},
                host=kept,
            )
        )
    flops = _distill_flops(teachers, student, settings, window, heldout_windows, steps, step_tokens)
    tokens, cached = steps * step_tokens, 0.0
    if not live:
        distinct = min(tokens, distinct_tokens or tokens)
        flops += distinct * sum(teacher.flops_per_token(window) for teacher in teachers)
        cached += distinct * cache_bytes(settings) * len(teachers)
        if settings.hidden.weight != 0 and teachers:  # of the first teacher, in 8 bits
            cached += distinct * student.num_hidden_layers * hidden_bytes(teachers[0])
        capture = {
            "weights": 4.0 * parameters,
            "teacher": float(width * max((t.parameters for t in teachers), default=0)),
            "gathered layers": held["gathered layers"],
            ENDS: 1.0 * width * max((t.embedding_parameters for t in teachers), default=0),
            "logits": 3.0 * 4 * min(window, LOGIT_POSITIONS) * vocabulary,
            "activations": max(window, MICRO_TOKENS)
            * max((answer_bytes(each, window, product) for each in teachers), default=0.0),
        }
        # Here each process has the answers to all held-out windows.
        moments.append(Moment(what="capture", device=capture, host={"all " + HELDOUT: asked}))
    between = {
        name: held[name]
        for name in ("weights", "optimizer", "teacher", "teacher's output head", "average")
        if held[name]
    }
    moments += _file_moments(
        teachers, student, between, kept, width=width, stored=dtype_bytes, on_cpu=on_cpu
    )
    state = 4.0 * parameters + held["optimizer"] + held["average"]
    keeps_best = settings.keep == "best" and settings.evaluate_every > 0
    bests = (steps - 1) // settings.evaluate_every if keeps_best else 0
    return Cost(
        moments=tuple(moments),
        disk=parameters * dtype_bytes + cached,
        cached=cached,
        # The new checkpoint is whole before the old one goes; beside them lie the best weights,
        # and those that the old one names.
        scratch=2 * state + (8.0 * parameters if keeps_best else 0.0),
        flops={"product": flops},
        tokens=tokens,
        product=product,
        # Each takes a window of the step at least; a split student can't write.
        most_processes=1 if settings.on_policy else step_tokens // window,
        writing=_on_policy(teachers, student, settings, window, micro, tokens, width),
        saving=Saving(
            bytes=state,
            every=settings.save_every_seconds,
            steps=steps,
            best=4.0 * parameters * bests,
        ),
        moved=float(dtype_bytes * (2 * parameters + sum(t.parameters for t in teachers))),
    )


def _file_moments(
    teachers: tuple[Shape, ...],
    student: Shape,
    between: Bytes,
    kept: Bytes,
    *,
    width: int,
    stored: int,
    on_cpu: bool,
) -> list[Moment]:
    """What reading models, saving checkpoints and writing the student take of the host's memory.

    One process reads a whole model before it moves it to its device, and fetches a checkpoint group
    by group. Several read tensor by tensor; each writes its part through a copy as bytes; and the
    first gathers the student in its ``stored`` bytes a number and opens what it has written. On a
    CPU nothing is moved or fetched. ``between`` is what lies on the device between two steps,
    ``kept`` beside it.
    """
    moments = []
    if not on_cpu:
        read = 1.0 * max([4 * student.parameters, *(width * each.parameters for each in teachers)])
        moments.append(Moment(what="load", split=False, device={}, host={"a model": read}))
    table = student.vocab_size * student.hidden_size
    tables = (width * each.vocab_size * each.hidden_size for each in teachers)
    tensor = 1.0 * max([4 * table, *tables])
    moments.append(Moment(what="load", split=True, device={}, host={"one tensor": tensor}))
    group = max(between[name] for name in ("weights", "optimizer"))
    for split in (False, True):
        if copies := (not on_cpu) + split:
            saved = {SAVED: copies * group, **kept}
            moments.append(Moment(what="save", split=split, device=between, host=saved))
    whole = {GATHERED: 2.0 * stored * student.parameters, **kept}
    return [*moments, Moment(what="finish", split=True, device=between, host=whole)]


def cache_bytes(settings: DistillSettings) -> int:
    """A token's share of the target cache: four bytes a slot, and four for the entropy."""
    return 4 * settings.target_slots + 4


def hidden_bytes(teacher: Shape) -> int:
    """A token's share of a kept layer: a byte a dim, and two for the scale of each 64."""
    return teacher.hidden_size + 2 * -(-teacher.hidden_size // 64)


def _on_policy(
    teachers: tuple[Shape, ...],
    student: Shape,
    settings: DistillSettings,
    window: int,
    micro: int,
    tokens: int,
    width: int,
) -> Writing | None:
    """The second halves of some windows, written a micro-batch at a time."""
    if not settings.on_policy:
        return None
    by_teacher = settings.on_policy_writer == "teacher"
    writer = teachers[0] if by_teacher else student
    weights = (width if by_teacher else 4) * writer.parameters
    rounds, share = tokens / micro, settings.on_policy
    # A round is left out where no window of it is chosen.
    asked = rounds * (1 - (1 - share) ** (micro / window))
    steps, written = asked * (window / 2), share * tokens / 2
    return Writing(
        tokens=round(written),
        layer_steps=steps * writer.num_hidden_layers,
        flops=written * writer.flops_per_token(window),
        bytes=steps * weights + 1.5 * written * window * writer.key_value_bytes_per_token(width),
    )


def _distill_flops(
    teachers: tuple[Shape, ...],
    student: Shape,
    settings: DistillSettings,
    window: int,
    heldout_windows: int,
    steps: int,
    step_tokens: int,
) -> float:
    forward = student.flops_per_token(window)
    again = _trunk_flops(student, window) if settings.gradient_checkpointing else 0.0
    taught = sum(teacher.flops_per_token(window) for teacher in teachers)
    total = steps * step_tokens * (3 * forward + again)
    if settings.targets == "live":
        total += steps * step_tokens * taught
    if settings.optimizer == "muon":
        total += steps * _muon_flops(student)
    every = settings.evaluate_every
    evaluations = 2 + (steps - 1) // every if every else 2
    heads = sum(2.0 * t.vocab_size * t.hidden_size for t in teachers)
    heldout = heldout_windows * window
    return total + heldout * (taught + evaluations * (forward + heads))


# --- benchmark, export --------------------------------------------------------------------------

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
