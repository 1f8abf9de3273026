"""Which of several shapes to cut a model to: each is pruned cheaply and held against the model.

The score is KL(teacher || student) on held-out windows, straight after pruning. It is kept in
``search.json`` as soon as it is there, so a killed search goes on at the shape it was at.

Legend: B windows, T positions, N positions that count, D hidden, E teacher hidden, V vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.data import make_batch, vocabulary_of
from compress.fused import FusedLoss, compare
from compress.layer import LayerMath, normed, read_layer
from compress.losses import LiveTargets
from compress.precision import fast_dtype
from compress.prune import identity_of_cut, prune
from compress.settings import PruneSettings
from shearling import Progress, ShearlingError, read_json, silent, write_json
from students.shape import Shape
from teachers.checkpoint import Checkpoint, open_checkpoint
from teachers.layout import EMBEDDING, FINAL_NORM, HEAD
from teachers.transfer_set import TransferSet


def search(
    teacher: Path,
    out: Path,
    shapes: Sequence[Shape],
    transfer_set: Path,
    settings: PruneSettings,
    *,
    tokens: int,
    seed: int,
    device: str = "cpu",
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Score every shape, best first: {"shape", "parameters", "kl" in nats a token}.

    Each is pruned on ``tokens`` tokens into ``out/search``, from where it goes when its score
    stands in ``out/search.json``.

    Raises:
        ShearlingError: as ``prune`` does; or there is no held-out text.
    """
    source, text = open_checkpoint(teacher), TransferSet(transfer_set)
    wanted = [shape.to_dict() for shape in shapes]
    identity = identity_of_cut(source, text, settings, wanted, tokens, seed)
    path, place = out / "search.json", torch.device(device)
    kept = read_json(path) if path.exists() else {}
    if not isinstance(kept, dict) or kept.get("identity") != identity:
        shutil.rmtree(out / "search", ignore_errors=True)
        # Measured once, lest a busy machine change the arithmetic between two candidates.
        precision = fast_dtype(place, settings.precision).name
        kept = {"schema": 1, "identity": identity, "precision": precision, "scores": []}
        write_json(path, kept)
    cheap = settings.model_copy(
        update={
            "calibration_tokens": min(tokens, settings.calibration_tokens),
            "precision": kept["precision"],
        }
    )
    scores: list[dict[str, Any]] = kept["scores"]
    reference = None
    for number, shape in enumerate(shapes[len(scores) :], len(scores) + 1):
        folder = out / "search" / str(number)
        part = _part_of(progress, f"candidate {number} of {len(shapes)}: ")
        prune(teacher, folder, shape, transfer_set, cheap, seed=seed, device=device, progress=part)
        reference = reference or Reference(
            source, text, tokens, place, fast_dtype(place, cheap.precision).dtype
        )
        kl = reference.divergence(Checkpoint(folder / "model"))
        scores.append({"shape": shape.to_dict(), "parameters": shape.parameters, "kl": kl})
        write_json(path, kept)
        shutil.rmtree(folder)
    shutil.rmtree(out / "search", ignore_errors=True)
    return sorted(scores, key=lambda score: float(score["kl"]))


def _part_of(progress: Progress, label: str) -> Progress:
    def told(what: str, done: int, total: int, /, **numbers: float) -> None:
        progress(label + what, done, total, **numbers)

    return told


class Reference:
    """What the teacher says about held-out windows, at most ``tokens`` tokens of them."""

    def __init__(
        self,
        teacher: Checkpoint,
        text: TransferSet,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        count = min(len(text.heldout), max(1, tokens // text.window))
        windows = text.heldout_batch(list(range(count)))
        self.batch = make_batch(
            windows["input_ids"],
            windows["position_ids"],
            device,
            loss_mask_BT=windows.get("loss_mask"),
        )
        if not self.batch.positions:
            raise ShearlingError(
                "The transfer set has no held-out text on which shapes could be compared.",
                hint="Add text to transfer_set.sources, or raise transfer_set.heldout_windows.",
            )
        self.teacher, self.device = teacher, device
        vocabulary = vocabulary_of([teacher.folder], text)
        self.fused = FusedLoss(terms=(), dtype=dtype, vocabulary=vocabulary)
        self.hidden_NE = self._hidden(teacher)

    def divergence(self, student: Checkpoint) -> float:
        """KL(teacher || student), mean over the positions that count, in nats."""
        found = compare(
            self._hidden(student),
            self._head(student),
            LiveTargets(self.hidden_NE, self._head(self.teacher)),
            self.batch.labels_N,
            self.fused,
        )
        return found.forward_kl / found.positions

    @torch.no_grad()
    def _hidden(self, model: Checkpoint) -> Tensor:
        """Final hidden states where positions count, [N, D], with one layer in memory at a time.

        A window is one text here, as it is to the pruning walk.
        """
        tokens_BT = self.batch.input_BT.cpu()
        maths = LayerMath(model.config, tokens_BT.shape[1], self.device, self.fused.dtype)
        stream_BTD = model.tensor(EMBEDDING)[tokens_BT].float()
        for layer in range(model.shape.num_hidden_layers):
            maths.advance(stream_BTD, read_layer(model, layer, self.device))
        stream_ND = self.batch.pick(stream_BTD.to(self.device))
        norm_D = model.tensor(FINAL_NORM, torch.float32).to(self.device)
        return normed(stream_ND, maths.eps) * norm_D

    def _head(self, model: Checkpoint) -> Tensor:
        """The output head, [V, D]; read when it is needed, for it is large beside a layer."""
        return model.tensor(HEAD).to(self.device, self.fused.dtype)
