"""What a training costs, as formulas of shapes (see ``pipelines.estimate``).

Legend of the comments: N positions, T positions of a window, V vocabulary, E teacher hidden,
D student hidden, Q query rows, K key/value rows, F neurons, s bytes of a product's numbers.
"""

from __future__ import annotations

from collections.abc import Iterable

from compress.settings import DistillSettings
from pipelines.cost import (
    ENDS,
    GATHERED,
    HELDOUT,
    NARROW,
    SAVED,
    WIDTH,
    Bytes,
    Cost,
    Moment,
    Saving,
    Writing,
    trunk_flops,
)
from students.shape import Shape

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


def activation_bytes(shape: Shape, window: int, product: str, *, on_cpu: bool) -> float:
    """What autograd keeps of one position in one layer, without checkpointing.

    Two norms keep their inputs in float32 and what they give in the products' dtype, the MLP gate
    and up. The CPU's attention for short windows keeps queries, keys, values, what it gives, and
    the probabilities, T numbers a head but for what lies ahead of a block. PyTorch's keeps the mask
    that holds documents apart, T numbers, which is most of it in long windows. Of an MLP with a
    bias or another activation than SiLU the product is kept too, which is not counted.
    """
    width = WIDTH[product]
    others = (8.0 + 2.0 * width) * shape.hidden_size + 2.0 * width * shape.intermediate_size
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


def compared_bytes(
    settings: DistillSettings, teacher: Shape, student: Shape, product: str
) -> float:
    """What a position of a step keeps of the layers that are compared: the teacher's, from the
    cache in float32, and of the student's what a loss is differentiated by (cosine: two numbers a
    dim, else one, in float32)."""
    live = settings.targets == "live"
    theirs = (WIDTH[product] if live else 4.0) * teacher.hidden_size
    places = [each for each in (settings.hidden, settings.attention) if each.weight != 0]
    ours = sum((8.0 if place.kind == "cosine" else 4.0) for place in places) * student.hidden_size
    return student.num_hidden_layers * (len(places) * theirs + ours)


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
    down = student.num_hidden_layers * student.hidden_size * student.intermediate_size
    narrow_weights = 0.0 if product == "float32" else float(width * (parameters - down))
    chunk = min(settings.chunk(on_cpu=on_cpu), micro)
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
    compared = compared_bytes(settings, teachers[0], student, product) if teachers else 0.0
    held["compared layers"] = micro * compared
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
        hidden = 0.0
        if settings.hidden.weight != 0 and teachers:  # of the first teacher, in a pass of their own
            cached += distinct * student.num_hidden_layers * hidden_bytes(teachers[0])  # in 8 bits
            flops += distinct * trunk_flops(teachers[0], window)
            hidden = 1.0 * width * student.num_hidden_layers * teachers[0].hidden_size
        capture = {
            "weights": 4.0 * parameters,
            "teacher": float(width * max((t.parameters for t in teachers), default=0)),
            "gathered layers": held["gathered layers"],
            ENDS: 1.0 * width * max((t.embedding_parameters for t in teachers), default=0),
            "logits": 3.0 * 4 * min(window, LOGIT_POSITIONS) * vocabulary,
            "activations": micro
            * max((answer_bytes(each, window, product) for each in teachers), default=0.0),
            **({"compared layers": micro * hidden} if hidden else {}),
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
    again = trunk_flops(student, window) if settings.gradient_checkpointing else 0.0
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
