"""What a recipe may say about pruning and distilling: data only, so no torch is loaded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from shearling import ShearlingError
from students.settings import MOST, Count, Settings
from students.shape import Shape

Precision = Literal["auto", "float32", "bfloat16"]
Importance = Literal["greedy", "activation", "taylor", "magnitude"]
_HOW_SAFELY = frozenset({"save_every_seconds", "stream_memory_gb"})
_HOW_LARGE = frozenset({"micro_batch_windows", "chunk_tokens", "gradient_checkpointing", "compile"})


def without_effect(settings: Settings) -> frozenset[str]:
    """Settings that only say how safely, how fast or on how small a machine a stage works.

    Results depend on them by rounding at most, as on the number of processes, so a stage that ran
    out of memory goes on with others. Text that a model writes is drawn a micro-batch at a time.
    A clip by position that is off is as it was before there was one.
    """
    writes = getattr(settings, "on_policy", 0) != 0
    large = _HOW_LARGE - {"micro_batch_windows"} if writes else _HOW_LARGE
    off = frozenset() if getattr(settings, "position_clip", 0) else {"position_clip"}
    return _HOW_SAFELY | large | off


def deciding(settings: Settings, kind: type[Settings]) -> dict[str, Any]:
    """Those settings of ``kind`` on which results depend; not what a recipe calls its stage."""
    return settings.model_dump(include=set(kind.model_fields) - without_effect(settings))


class PruneSettings(Settings):
    """How a teacher is cut. The shape itself is part of the recipe's prune stage."""

    calibration_tokens: Count = Field(
        default=65536, gt=0, description="Tokens of the transfer set that pruning looks at."
    )
    depth: Literal["cosine", "contiguous", "divergence"] | list[int] = Field(
        default="contiguous",
        description="Which layers stay: all but the run of neighbours that changes the residual "
        "stream least (contiguous), the layers that change it most (cosine), those without which "
        "the teacher's answers diverge most, one removed after another (divergence), or a list of "
        "layer numbers.",
    )
    importance: Importance | None = Field(
        default=None,
        description="How parts are chosen: heads and neurons removed one after another where the "
        "others, refitted, can best do without (greedy); by the size of what they add to the "
        "stream (activation); by the loss's gradient, hidden dims too (taylor); or by the size of "
        "their weights, hidden dims too (magnitude). By default greedy, but activation where "
        "nothing is refitted.",
    )
    basis: Literal["principal", "dims"] | None = Field(
        default=None,
        description="How the residual stream is narrowed: to the leading principal directions of "
        "the teacher's, turned toward its largest dims (principal), or to those dims (dims). By "
        "default principal, but dims where two matrices are merged (see `merge`).",
    )
    merge: Literal["split", "least_squares"] = Field(
        default="least_squares",
        description="How one matrix comes to serve as embedding and output head where the "
        "teacher has two: half of the hidden dims for each end (split), or the directions in "
        "which both lie best (least_squares).",
    )
    refit: bool = Field(
        default=True,
        description="Refit the kept weights to the teacher's activations by least squares "
        "after selection (reconstruction). False is plain slicing.",
    )
    ridge: float | None = Field(
        default=None,
        gt=0,
        description="Strength of the pull toward the sliced weights, relative to the mean "
        "squared input of each linear map; by default chosen for each map on held-out windows.",
    )
    precision: Precision = Field(
        default="auto",
        description="Arithmetic of the models' products, and on a CPU of the sums over positions; "
        "auto measures.",
    )
    stream_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="How the two residual streams of all windows are kept."
    )
    stream_memory_gb: float = Field(
        default=4.0,
        ge=0,
        description="Streams that need more than this lie in files beside the student and are "
        "read as the walk passes over them.",
    )
    save_every_seconds: float = Field(
        default=300.0,
        ge=0,
        description="Seconds between checkpoints of the walk, taken between two layers; 0 takes "
        "one after each.",
    )

    def check_depth(self, teacher: Shape, student: Shape) -> None:
        """A given list of layers is one that the shapes allow.

        Raises:
            ShearlingError: it isn't.
        """
        depth, count, total = self.depth, student.num_hidden_layers, teacher.num_hidden_layers
        if isinstance(depth, list) and (
            sorted(set(depth)) != depth
            or len(depth) != count
            or not 0 <= depth[0] <= depth[-1] < total
        ):
            raise ShearlingError(
                f"depth lists {depth}; the shape wants {count} different layers, ascending, "
                f"out of 0 to {total - 1}.",
                hint="Correct `depth` or `shape.num_hidden_layers` in the recipe's prune stage.",
            )

    @property
    def chosen_by(self) -> Importance:
        """How heads and neurons are chosen; see ``importance``."""
        return self.importance or ("greedy" if self.refit else "activation")

    def basis_for(self, teacher: Shape, student: Shape) -> Literal["principal", "dims"]:
        """How a student of this shape gets its stream; see ``basis``."""
        merged = student.merges_ends_of(teacher)
        if student.hidden_size == teacher.hidden_size or (self.basis is None and merged):
            return "dims"
        return self.basis or "principal"


class Ramp(Settings):
    """A number that changes while the stage trains."""

    start: float = Field(ge=0, description="Its value in the first step.")
    end: float = Field(ge=0, description="Its value in the last step.")
    shape: Literal["linear", "cosine"] = Field(
        default="linear", description="How it gets from the one to the other."
    )


def _number_or_ramp(value: Any) -> str:
    return "ramp" if isinstance(value, (dict, Ramp)) else "number"


Weight = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | Annotated[Ramp, Tag("ramp")],
    Discriminator(_number_or_ramp),
]
"""A number, or {start: ..., end: ...}."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class HiddenLoss(Settings):
    """Match the student's hidden states with the teacher's, cut as the student was cut."""

    kind: Literal["cosine", "mse", "normalised_mse"] = Field(
        default="cosine",
        description="1 - cosine similarity; the mean squared error; or the squared error over the "
        "teacher's squared size, so that layers of any size weigh alike.",
    )
    weight: Weight = Field(default=0.0, description="Weight in the total loss; 0 is off.")


class DistillSettings(Settings):
    """How a student is taught.

    Schedule, betas, weight decay and the whole gradient's clipping are those of the Llama papers;
    losses, optimizer, learning rate, batch and the clipping by position are what was best on small
    budgets of tokens (docs/LOG.md).
    """

    tokens: Count = Field(gt=0, description="Tokens of the transfer set that the student sees.")
    batch_tokens: Count = Field(
        default=1024, gt=0, le=10**9, description="Tokens an optimizer step sees."
    )
    micro_batch_windows: int | None = Field(
        default=None,
        gt=0,
        description="Windows in one forward pass; by default as many as make 1024 tokens.",
    )

    forward_kl: Weight = Field(
        default=0.7,
        description="Weight of KL(teacher || student). This and all weights may be a number or "
        "{start: 1, end: 0}, which changes with the steps.",
    )
    reverse_kl: Weight = Field(default=0.0, description="Weight of KL(student || teacher).")
    jensen_shannon: Weight = Field(
        default=0.0, description="Weight of the (generalised) Jensen-Shannon divergence."
    )
    jensen_shannon_beta: float = Field(
        default=0.5, gt=0, lt=1, description="The teacher's share in its mixture; 0.5: symmetric."
    )
    skewed_kl: Weight = Field(
        default=0.0, description="Weight of KL(teacher || a little teacher + student)."
    )
    skewed_reverse_kl: Weight = Field(
        default=0.0, description="Weight of KL(student || a little student + teacher)."
    )
    skew: float = Field(
        default=0.1, gt=0, lt=1, description="How much `a little` is in the skewed losses."
    )
    cross_entropy: Weight = Field(
        default=0.3,
        description="Weight of the labels' loss: what the text says, beside what the teacher says.",
    )
    hidden: HiddenLoss = Field(default=HiddenLoss(), description="Hidden-state loss.")
    attention: HiddenLoss = Field(
        default=HiddenLoss(), description="The same for what attention adds to the hidden states."
    )
    temperature: Weight = Field(
        default=1.0,
        description="Both models' logits are divided by it in the divergences, whose value is "
        "multiplied by its square. May change with the steps, as weights may.",
    )
    chunk_tokens: Count | None = Field(
        default=None,
        gt=0,
        description="Tokens whose logits exist at one time in the loss; by default 256 on a CPU "
        "and 512 elsewhere.",
    )

    targets: Literal["live", "sample", "top_k"] = Field(
        default="live",
        description="Where the teacher's answers come from: computed in every step; or asked once "
        "and kept in the cache as an unbiased sample of tokens, or as the likeliest ones. With "
        "hidden.weight the compared layers are kept too, at a byte for each dim and layer.",
    )
    target_slots: int = Field(
        default=14, ge=2, le=256, description="Tokens a position that the cache keeps."
    )
    teachers: dict[str, Annotated[float, Field(gt=0, le=MOST)]] = Field(
        default={},
        description="Weights of several teachers with one tokenizer: `teacher` and names of "
        "teacher stages. Their probabilities are mixed. By default the teacher alone.",
    )
    on_policy: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of a step's windows whose second half the student writes itself "
        "before both models read it; 0 is off. Needs live targets and one process.",
    )
    on_policy_writer: Literal["student", "teacher"] = Field(
        default="student",
        description="Who writes these halves: the student, or the teacher (of several the first), "
        "for text that is new and yet the teacher's own.",
    )
    on_policy_temperature: float = Field(
        default=1.0, gt=0, description="Temperature at which these halves are written."
    )

    adaptive_mix: float = Field(
        default=0.0,
        ge=0,
        description="How strongly sources are favoured on which the student lags: at each "
        "evaluation a source's share of the steps is multiplied by exp(this x how far its loss on "
        "held-out text lies above the teacher's, in nats). 1 is Sheared-LLaMA's dynamic batch "
        "loading; 0 is off. Needs two sources and live targets.",
    )

    optimizer: Literal["adamw", "muon"] = Field(
        default="muon",
        description="muon takes the layers' matrices and leaves embeddings and norms to AdamW; "
        "its updates are scaled to AdamW's size, so learning rates mean the same.",
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="Peak learning rate.")
    embedding_learning_rate: float = Field(
        default=0.3,
        gt=0,
        description="Learning rate of embeddings and output head, as a share of the others'.",
    )
    final_learning_rate: float = Field(
        default=0.1, ge=0, le=1, description="Learning rate at the end, as a share of the peak."
    )
    warmup: float = Field(default=0.1, ge=0, le=1, description="Warm-up, as a share of all steps.")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="AdamW's betas.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decoupled weight decay of matrices; norms have none."
    )
    clip: float = Field(default=1.0, gt=0, description="Largest norm of the whole gradient.")
    position_clip: float = Field(
        default=5.0,
        ge=0,
        description="Largest norm of the gradient in the stream at one position, in medians of its "
        "window's positions that count. 0 is off.",
    )
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay of a running average of the weights, which is then what is evaluated "
        "and kept; less in the first steps. 0 is off.",
    )

    precision: Precision = Field(
        default="auto",
        description="Arithmetic of forward and backward; weights, optimizer and loss stay fp32. "
        "auto measures which is faster on this device.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute each layer a second time in backward: less memory, more time.",
    )
    evaluate_every: int = Field(
        default=10,
        ge=0,
        description="Steps between evaluations on held-out windows; 0: at start and end only.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the student's layers with torch.compile: slow to start, needs a "
        "C++ compiler on a CPU.",
    )
    spikes: Literal["stop", "skip"] = Field(
        default="stop",
        description="What to do when the loss is no number or jumps: stop, with the "
        "last checkpoint kept, or leave the step out (after five in a row it stops too).",
    )
    keep: Literal["best", "last"] = Field(
        default="best",
        description="Which weights become the stage's model: the best evaluated or the last.",
    )
    save_every_seconds: float = Field(
        default=60.0,
        ge=0,
        description="Seconds between checkpoints, or twenty times what one takes if that is more; "
        "0 saves after every step.",
    )

    @model_serializer(mode="wrap")
    def _writer_only_if_writing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Where nobody writes, who would changes nothing: neither a key nor a checkpoint."""
        data: dict[str, Any] = handler(self)
        return {k: v for k, v in data.items() if k != "on_policy_writer" or self.on_policy}

    def chunk(self, *, on_cpu: bool) -> int:
        """Tokens whose logits exist at one time in the loss.

        Each chunk adds to the whole head's gradient, which an accelerator, whose products are
        faster beside its memory, can do less often.
        """
        return self.chunk_tokens or (256 if on_cpu else 512)

    @model_validator(mode="after")
    def _check_writer(self) -> DistillSettings:
        if self.on_policy_writer == "teacher" and not self.on_policy:
            raise ValueError("on_policy_writer: nobody writes; set on_policy above 0")
        return self

    @model_validator(mode="after")
    def _check_temperature(self) -> DistillSettings:
        ends = self.temperature
        if min((ends.start, ends.end) if isinstance(ends, Ramp) else (ends,)) <= 0:
            raise ValueError("temperature must be greater than 0")
        return self

    @model_validator(mode="after")
    def _check_loss(self) -> DistillSettings:
        divergences = (
            self.forward_kl,
            self.reverse_kl,
            self.jensen_shannon,
            self.skewed_kl,
            self.skewed_reverse_kl,
        )
        weights = [*divergences, self.cross_entropy, self.hidden.weight, self.attention.weight]
        ends = [(w.start, w.end) if isinstance(w, Ramp) else (w,) for w in weights]
        if not any(map(any, ends)):
            raise ValueError("every weight is 0: nothing would be learnt; set forward_kl above 0")
        return self

    @model_validator(mode="after")
    def _check_targets(self) -> DistillSettings:
        divergences = ("reverse_kl", "jensen_shannon", "skewed_kl", "skewed_reverse_kl")
        unkept = [name for name in divergences if getattr(self, name)]
        unkept += ["temperature"] if self.temperature != 1 else []
        unkept += ["attention.weight"] if self.attention.weight else []
        unkept += ["on_policy"] if self.on_policy else []
        if self.adaptive_mix and not self.evaluate_every:
            raise ValueError("adaptive_mix follows evaluations; set evaluate_every above 0")
        if self.adaptive_mix and self.targets != "live":
            raise ValueError(
                f"adaptive_mix can't be used with targets: {self.targets}, for which windows "
                "would have to be known before; set targets to live"
            )
        if self.targets != "live" and unkept:
            raise ValueError(
                f"{', '.join(unkept)} can't be used with targets: {self.targets}, which keeps "
                "what forward_kl at temperature 1 needs; set targets to live"
            )
        if self.teachers and "teacher" not in self.teachers:
            raise ValueError("teachers must name `teacher` too, of which the student was cut")
        if self.targets == "top_k" and len(self.teachers) > 1:
            raise ValueError(
                "several teachers can't be mixed from targets: top_k, whose tails overlap; set "
                "targets to sample or live"
            )
        return self


class CorrectSettings(Settings):
    """How a teacher is fitted to the transfer set before it teaches: next-token training.

    A teacher that was trained on other text teaches better once it has read some of this
    (Sreenivas et al. 2024, https://arxiv.org/abs/2408.11796). The rate is low on purpose; it has
    not been tuned here.
    """

    tokens: Count = Field(gt=0, description="Tokens of the transfer set that the teacher reads.")
    batch_tokens: Count = Field(
        default=8192, gt=0, le=10**9, description="Tokens an optimizer step sees."
    )
    micro_batch_windows: int | None = Field(
        default=None,
        gt=0,
        description="Windows in one forward pass; by default as many as make 1024 tokens.",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="As in a distill stage."
    )
    learning_rate: float = Field(default=1e-5, gt=0, description="Peak learning rate.")
    final_learning_rate: float = Field(
        default=0.1, ge=0, le=1, description="Learning rate at the end, as a share of the peak."
    )
    warmup: float = Field(default=0.1, ge=0, le=1, description="Warm-up, as a share of all steps.")
    precision: Precision = Field(
        default="auto", description="Arithmetic of forward and backward; auto measures."
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute each layer a second time in backward: less memory, more time.",
    )
    evaluate_every: int = Field(
        default=10,
        ge=0,
        description="Steps between evaluations on held-out windows; 0: at start and end only.",
    )
    save_every_seconds: float = Field(
        default=60.0,
        ge=0,
        description="Seconds between checkpoints, or twenty times what one takes if that is more; "
        "0 saves after every step.",
    )

    def as_distillation(self) -> DistillSettings:
        """The same as settings of the training loop: labels and no divergence."""
        mine = {name: getattr(self, name) for name in CorrectSettings.model_fields}
        return DistillSettings(
            **mine,
            forward_kl=0.0,
            cross_entropy=1.0,
            embedding_learning_rate=1.0,
            position_clip=0.0,  # it was measured on cut students alone
        )
