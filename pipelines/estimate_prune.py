"""What a prune stage costs, as formulas of shapes (see ``pipelines.estimate``).

Legend of the comments: N positions, T positions of a window, V vocabulary, E teacher hidden,
D student hidden, Q query rows, K key/value rows, F neurons, s bytes of a product's numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.settings import PruneSettings
from pipelines.cost import WIDTH, Cost, Moment, trunk_flops
from students.shape import Shape

STUDENT_SHARD = 512 * 1024**2
SURVEY_TOKENS, GREEDY_TOKENS, FINAL_POSITIONS, WALK_BATCH_TOKENS = 16384, 32768, 4096, 4096
DEPTH_TOKENS, TAYLOR_TOKENS, METRIC_CHUNK, SOLVED_OUTPUTS = 2048, 8192, 512, 2048
OPENING_EVERY, HEAD_POSITIONS, DEPTH_CHUNK = 32, 512, 512
"""As in compress.survey, .layer, .depth, .taylor, .ends and .reconstruct."""
RIDGES, JUDGED_OUTPUTS, GRAM_ROWS = 3, 700, 1024
"""Ridges tried for a map: the one of the layer before and its neighbours; about how many outputs
judge them; rows of a Gram matrix in one product (compress.reconstruct)."""


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
    calibration = -(-settings.calibration_tokens // window) * window
    survey = min(passed(GREEDY_TOKENS if greedy else SURVEY_TOKENS, window), calibration)
    told = calibration if settings.refit else survey
    tracks = [calibration, openings(calibration, window)] if settings.refit else []
    survey, tokens = survey + openings(survey, window), sum(tracks)
    vocabulary, wide, narrow = student.vocab_size, before.hidden_size, student.hidden_size
    table = float(student.embedding_parameters)
    widest = max(student.query_size, student.intermediate_size)
    stream = WIDTH[settings.stream_dtype]
    widths = (wide * stream, narrow * stream, widest * WIDTH[product])  # as compress.walk.Track
    limit = settings.stream_memory_gb * 1024**3
    streams, spilled = _streams([track * width for track in tracks for width in widths], limit)
    gradients, spilled_first = _streams(_taylor_streams(before, settings, survey, window), limit)
    kept = {
        "embeddings": dtype_bytes * table,
        "residual streams": streams,
        "a shard": 1.0 * min(student.parameters * dtype_bytes, STUDENT_SHARD),
    }
    positions = min(passed(WALK_BATCH_TOKENS, window), max(tokens, survey))
    activations = (
        4.0 * positions * (4 * before.intermediate_size + 6 * wide + 3 * before.query_size)
    )
    # The teacher's layer as it is stored, on a CPU as pages of its file.
    stored = float(dtype_bytes * before.layer_parameters)
    surveyed = {"teacher layer": stored, "activations": activations}
    if greedy:
        surveyed["Gram matrices"] = 4.0 * sum(size**2 for size, _ in _chosen(before, student))
    # What is cut of the teacher's layer in float32, sliced and refitted.
    walked = {
        "teacher layer": stored,
        "student layer": 8.0 * student.layer_parameters,
        "activations": activations,
    }
    cutting = {**walked, "teacher layer": (4.0 + dtype_bytes) * before.layer_parameters}
    # Logits of a chunk and their softmax; the metric of a wide head, in float32 and float64.
    metric = {
        "logits": 12.0 * METRIC_CHUNK * vocabulary,
        "metric": 12.0 * narrow * (wide + narrow),
        "output heads": 1.0 * dtype_bytes * vocabulary * (wide + narrow),
    }
    # A layer and the output head in float32; the rest is mapped from the student's files.
    check = {"student": 4.0 * (student.layer_parameters + vocabulary * narrow)}
    moments = [
        Moment(what="survey", device=surveyed, host={"residual streams": 4.0 * survey * wide}),
        *_choice_moments(before, student, settings, surveyed, survey, window, gradients),
        *_merge_moments(before, student, settings, dtype_bytes),
        Moment(what="start", device=metric, host={"embeddings": dtype_bytes * table}),
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
        # A checkpoint is whole before the one before it goes.
        scratch=max(2.0 * tokens * (widths[0] + widths[1]) + spilled, spilled_first),
        flops=_prune_flops(before, student, settings, tokens, survey, window),
        tokens=told,
        product=product,
        moved=float(2 * before.parameters + 2 * student.parameters) * dtype_bytes
        + dtype_bytes * _choice_reads(before, student, settings),
    )


def passed(limit: int, window: int) -> int:
    """Positions of as many windows as ``limit`` holds, of one at least: windows pass whole."""
    return max(1, limit // window) * window


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
        scratch=max(final.scratch, *(cost.disk + cost.scratch for cost in tries)),
        flops={**flops, "product": flops["product"] + asked + heads},
        tokens=final.tokens + sum(cost.tokens for cost in tries),
        moved=sum(cost.moved for cost in (final, *tries)),
        product=product,
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
    window: int,
    gradients: float,
) -> list[Moment]:
    """What choosing needs beside a layer: Gram matrices and what is made of them, streams.

    ``gradients`` are the bytes of Taylor's streams in memory.
    """
    moments = []
    head = float(before.vocab_size * before.hidden_size)
    whole = {**layers, "teacher layer": 4.0 * before.layer_parameters}  # in float32
    chosen = _chosen(before, student)
    if settings.chosen_by == "greedy" and chosen:
        largest = max(size for size, _ in chosen)
        removal = 8.0 * largest**2 + 4.0 * before.hidden_size * largest
        idle = {**layers, "activations": 0.0}
        stream = {"residual streams": 4.0 * survey * before.hidden_size}
        moments.append(
            Moment(what="greedy choice", device={**idle, "removal": removal}, host=stream)
        )
    if settings.chosen_by == "taylor":
        moments.append(
            Moment(
                what="gradients",
                device={
                    **whole,
                    "graph": 2 * layers["activations"],
                    "output head": 4 * head,
                    "logits": 16.0 * HEAD_POSITIONS * before.vocab_size,
                },
                host={"streams": gradients},
            )
        )
    if _dropped(before, student) and settings.depth == "divergence":
        # Those without a layer, the whole one, and where all start; twice what the head reads.
        one = 4.0 * min(survey, passed(DEPTH_TOKENS, window)) * before.hidden_size
        held = {"a stream for each layer": (before.num_hidden_layers + 2) * one}
        read = {"output head": 4 * head, "final states": 2 * one}
        logits = {"logits": 24.0 * DEPTH_CHUNK * before.vocab_size}
        moments += [
            Moment(what="depth", device={**whole, "Gram matrices": 0.0, **read}, host=held),
            Moment(what="answers without a layer", device={**read, **logits}, host=held),
        ]
    if settings.basis_for(before, student) == "principal":
        basis = {"principal directions": 40.0 * before.hidden_size**2}
        moments.append(Moment(what="basis", device={}, host=basis))
    return moments


def _merge_moments(
    before: Shape, student: Shape, settings: PruneSettings, dtype_bytes: int
) -> list[Moment]:
    """Two matrices that become one, in float32 where the work is, and then as it is stored."""
    if not student.merges_ends_of(before):
        return []
    table = float(student.vocab_size * student.hidden_size)
    work = {
        "embeddings": 4.0 * table,
        "output head": 1.0 * dtype_bytes * before.vocab_size * before.hidden_size,
    }
    if settings.merge == "least_squares":
        work["joint directions"] = 20.0 * (2 * before.hidden_size) ** 2
    return [Moment(what="merge", device=work, host={"embeddings": dtype_bytes * table})]


def _streams(sizes: Sequence[float], limit: float) -> tuple[float, float]:
    """Bytes of streams in memory and in files: each is whole where it is (compress.streams)."""
    left = limit
    for size in sizes:
        left -= size if size <= left else 0.0
    return limit - left, sum(sizes) - (limit - left)


def _taylor_streams(
    before: Shape, settings: PruneSettings, survey: int, window: int
) -> list[float]:
    """Bytes of the stream before each layer, behind the last, and of its gradient."""
    if settings.chosen_by != "taylor":
        return []
    tokens = min(survey, passed(TAYLOR_TOKENS, window))
    one = 1.0 * WIDTH[settings.stream_dtype] * before.hidden_size * tokens
    return [one] * (before.num_hidden_layers + 2)


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
        gradients = min(survey, passed(TAYLOR_TOKENS, window))
        products += 4.0 * gradients * trunk_flops(before, window)
    if settings.depth == "divergence":
        # Every layer that is left takes the whole stream and those without each one before it.
        lefts = range(student.num_hidden_layers + 1, layers + 1)
        passes = sum(left * (left + 1) / 2 for left in lefts)
        heads = sum(left + 1 for left in lefts)
        measured = min(survey, passed(DEPTH_TOKENS, window))
        products += measured * passes / layers * trunk_flops(before, window)
        products += 4.0 * measured * heads * before.vocab_size * wide
    if settings.chosen_by == "greedy":
        for inputs, left in _chosen(before, student):
            single += layers * survey * inputs * (inputs + min(inputs, GRAM_ROWS))
            # The inverse; for each input that goes, a half of what is left and the weights.
            removal = (inputs**3 - left**3) / 3 + wide * (inputs**2 - left**2)
            single += layers * (inputs**3 + removal)
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
    products = chosen["product"] + survey * trunk_flops(before, window)
    products += tokens * (trunk_flops(before, window) + trunk_flops(student, window))
    layers, single, double = student.num_hidden_layers, chosen["float32"], chosen["float64"]
    # Output maps once more, sliced, for what each position counts.
    outputs = student.query_size + student.intermediate_size
    products += 2.0 * tokens * layers * outputs * student.hidden_size
    for fit in _fits(before, student) if tokens else ():
        inputs, outputs = fit.inputs, fit.outputs
        gram = inputs * (inputs + min(inputs, GRAM_ROWS)) / 2  # blocks below the diagonal
        single += 2.0 * layers * tokens * (gram + inputs * fit.crossed)
        single += 2.0 * layers * inputs * fit.crossed * outputs * fit.mapped
        # Cholesky, solutions, and errors of those that are judged and of the sliced weights.
        judged = min(outputs, JUDGED_OUTPUTS)
        single += layers * RIDGES * (inputs**3 / 3 + 4.0 * inputs**2 * judged)
        single += layers * 2.0 * inputs**2 * outputs
        double += layers * (inputs**3 / 3 + 2.0 * inputs**2 * outputs)
    if settings.basis_for(before, student) == "principal":  # the teacher's stream, in two blocks
        single += 5.0 * layers * tokens * before.hidden_size * student.hidden_size
    # The metric of the output head, on the final states that are kept, and its map.
    wide, narrow = before.hidden_size, student.hidden_size
    final = min(survey, FINAL_POSITIONS)
    products += 2.0 * final * student.vocab_size * (2 * wide + narrow)
    single += 2.0 * student.vocab_size * narrow * (wide + narrow)
    double += narrow**3 / 3 + 2.0 * narrow**2 * wide
    if tokens:
        single += 2.0 * tokens * narrow * (wide + narrow)
    return {"product": products, "float32": single, "float64": double}
