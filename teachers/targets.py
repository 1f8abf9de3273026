"""The teacher's answers on the transfer set, kept on disk: asked once, used by every student.

A position keeps K tokens in four bytes each (the token's number, and in the bits that are left
the logarithm of its probability) and four bytes for the distribution's exact entropy: 60 bytes
with the default of 14 tokens. Two ways to choose the tokens:

- ``sample``: an unbiased random sample. Plain top-k teaches the student a wrong, too sharp
  distribution; a dozen sampled tokens teach the right one on average (Anshumann et al. 2025,
  Sparse Logit Sampling, https://arxiv.org/abs/2503.16870). The sample here is VarOpt's
  (Cohen et al. 2009, https://arxiv.org/abs/0803.0473): tokens above a threshold are always in,
  with their own probability, the others by systematic sampling with the threshold as weight. So
  all K are different, the weights sum to 1, and no unbiased choice of K varies less.
- ``top_k``: the K likeliest tokens; what is left of 1 is the tail's mass.

The folder's name is a hash of all that the answers depend on. Windows are captured when they are
first needed, each with a checksum that is written after it, so a capture that was killed goes on,
and the order of capture and the number of processes change nothing. How far what is kept is from
what was said is measured on the first windows, and kept beside it for all runs to come.

Legend: B windows, T positions, N positions, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import fcntl
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shearling import (
    Progress,
    ShearlingError,
    disk_errors,
    read_json,
    sha256_of_json,
    silent,
    sync,
    write_json,
)

SCHEMA = 1
_LEAST_LOG = 30.0
"""Probabilities below exp(-30) are kept as exp(-30)."""
_SHARD_BYTES = 64 * 2**20
_CHECKSUMS = "checksums.bin"
_LOCK = "lock"
_MEASURED = "measured.json"
_MEASURED_POSITIONS = 2048
"""Positions of which the error is measured: enough for a mean, few beside the whole text."""


@dataclass(frozen=True, kw_only=True)
class TargetFormat:
    """How a position's answer is kept."""

    kind: Literal["sample", "top_k"]
    slots: int
    vocabulary: int

    @property
    def index_bits(self) -> int:
        return max(1, (self.vocabulary - 1).bit_length())

    @property
    def levels(self) -> int:
        """How many different probabilities a slot can tell apart."""
        return 1 << (32 - self.index_bits)

    @property
    def record(self) -> np.dtype[Any]:
        return np.dtype([("slots", "<u4", (self.slots,)), ("entropy", "<f4")])

    @property
    def bytes_per_token(self) -> int:
        return self.record.itemsize


def top_tokens(probability_NV: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens and their probabilities, both [N, K]."""
    weights_NK, ids_NK = probability_NV.topk(slots)
    return ids_NK, weights_NK


def sample_tokens(probability_NV: Tensor, slots: int, offset_N: Tensor) -> tuple[Tensor, Tensor]:
    """VarOpt: K tokens and weights, [N, K], with E[Σ weight · onehot(token)] = probability.

    ``offset_N`` in (0, 1] is the only randomness: where systematic sampling begins. The threshold
    t solves Σ min(1, p / t) = K.
    """
    top_NK, top_ids_NK = probability_NV.topk(slots)
    tail_NV = probability_NV.scatter(-1, top_ids_NK, 0)
    # rest[j] is the mass beyond the j likeliest, summed from the small end for precision.
    rest_NK = tail_NV.sum(-1, keepdim=True) + top_NK.flip(-1).cumsum(-1).flip(-1)
    slot_K = torch.arange(slots, device=probability_NV.device)
    threshold_NK = rest_NK / (slots - slot_K)
    small_NK = top_NK <= threshold_NK
    small_NK[:, -1] = True
    sure_N1 = small_NK.int().argmax(-1, keepdim=True)
    threshold_N1 = threshold_NK.gather(-1, sure_N1)
    is_sure_NK = slot_K < sure_N1
    tail_NV.scatter_(-1, top_ids_NK, torch.where(is_sure_NK, 0, top_NK))
    reached_NV = tail_NV.cumsum(-1)
    drawn_N1 = slots - sure_N1
    reached_NV.mul_(drawn_N1 / reached_NV[:, -1:].clamp(min=1e-30))
    points_NK = (slot_K - sure_N1).clamp(min=0) + offset_N.unsqueeze(-1)
    points_NK = torch.minimum(points_NK, reached_NV[:, -1:]).to(reached_NV.dtype)
    drawn_ids_NK = torch.searchsorted(reached_NV, points_NK).clamp(max=probability_NV.shape[1] - 1)
    ids_NK = torch.where(is_sure_NK, top_ids_NK, drawn_ids_NK)
    return ids_NK, torch.where(is_sure_NK, top_NK, threshold_N1)


def pack(ids_NK: Tensor, weights_NK: Tensor, shape: TargetFormat) -> NDArray[np.uint32]:
    """Token numbers and probabilities in 32 bits each."""
    depth = -weights_NK.clamp(min=1e-30).log() / _LEAST_LOG * (shape.levels - 1)
    codes = depth.round().clamp(0, shape.levels - 1).long()
    packed: NDArray[Any] = (codes << shape.index_bits | ids_NK).cpu().numpy()
    return packed.astype(np.uint32)


def unpack(packed: NDArray[np.uint32], shape: TargetFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Token numbers, probabilities, and the tail's mass: [..., K], [..., K], [...]."""
    words = torch.from_numpy(packed.astype(np.int64))
    ids = words & ((1 << shape.index_bits) - 1)
    codes = (words >> shape.index_bits).float()
    weights = (codes * (-_LEAST_LOG / (shape.levels - 1))).exp()
    total = weights.sum(-1)
    if shape.kind == "sample":
        return ids, weights / total.unsqueeze(-1), torch.zeros_like(total)
    return ids, weights, (1 - total).clamp(min=0)


class WindowCache:
    """Fixed-size records of a teacher's answers on one transfer set, window by window.

    ``identity`` is all that the answers depend on, in plain JSON; it is kept in ``targets.json``
    and its hash names the folder, so two teachers never share one.

    Raises:
        ShearlingError: the folder belongs to something else, or a window's checksum is wrong.
    """

    def __init__(
        self, root: Path, identity: dict[str, Any], record: np.dtype[Any], windows: int, window: int
    ) -> None:
        self.record, self.window, self.identity = record, window, identity
        self.folder = root / sha256_of_json(identity)[:24]
        self._shard_windows = max(1, _SHARD_BYTES // (window * record.itemsize))
        self._shards: dict[int, np.memmap[Any, np.dtype[Any]]] = {}
        self._windows = windows
        self._known()
        self._look()

    def _look(self) -> None:
        """See what is there now."""
        self._checksums = _array(self.folder / _CHECKSUMS, np.dtype("<u8"), (self._windows,))
        kept = self.folder / _MEASURED
        self._measured: dict[str, float] = read_json(kept) if kept.exists() else {"positions": 0}

    def _known(self) -> None:
        path = self.folder / "targets.json"
        if not path.exists():
            write_json(path, self.identity)
        found = read_json(path)
        differing = [key for key in self.identity if found.get(key) != self.identity[key]]
        if differing:
            raise ShearlingError(
                f"The targets in {self.folder} are not what their name says: "
                f"{', '.join(differing)} differ.",
                hint=f"Delete {self.folder}; the teacher is asked again.",
            )

    @contextmanager
    def alone(self, progress: Progress = silent) -> Iterator[None]:
        """Keep other runs from filling this cache meanwhile; one that does is waited for.

        The lock is the operating system's and ends with its process. Where a disk knows no locks
        nobody waits: the teacher is asked twice then.
        """
        with disk_errors(self.folder):
            handle = (self.folder / _LOCK).open("ab")
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("targets: waiting for another run that asks", 0, 1)
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:
                pass
            self._look()
            yield

    def missing(self, windows: Iterable[int]) -> list[int]:
        """Those of ``windows`` that were not captured yet, sorted, each once."""
        return [number for number in sorted(set(windows)) if not self._checksums[number]]

    def keep(self, number: int, records_T: NDArray[Any]) -> None:
        """Keep one window's records; its checksum is what makes them count."""
        shard, place = divmod(number, self._shard_windows)
        self._shard(shard)  # makes the file
        # Plain writes of just these bytes: on a full disk a memory map ends the process with a bus
        # error, and machines that share a disk would write back each other's pages.
        self._put(f"shard-{shard:05d}.bin", place * records_T.nbytes, records_T.tobytes())
        checksum = np.array([_checksum(records_T)], "<u8")
        self._put(_CHECKSUMS, number * checksum.nbytes, checksum.tobytes())

    def _put(self, name: str, offset: int, data: bytes) -> None:
        path = self.folder / name
        with disk_errors(path), path.open("r+b", buffering=0) as file:
            file.seek(offset)
            left = memoryview(data)
            while left:  # a full disk may take a part before it refuses
                left = left[file.write(left) :]

    @property
    def unmeasured(self) -> int:
        """Of how many positions more the error is to be measured."""
        return max(0, _MEASURED_POSITIONS - int(self._measured["positions"]))

    def measured(self) -> dict[str, float]:
        """The mean errors of what is kept, whoever measured them; nothing in a cache of before."""
        return {name: mean for name, mean in self._measured.items() if name != "positions"}

    def measure(self, positions: int, errors: dict[str, float]) -> None:
        """Add the mean errors of some positions to those that are kept."""
        if not all(math.isfinite(error) for error in errors.values()):
            return  # of a teacher that says NaN; the evaluation tells so, with a remedy
        before = self._measured["positions"]
        together = before + positions
        means = {
            name: (before * self._measured.get(name, 0.0) + positions * error) / together
            for name, error in errors.items()
        }
        self._measured = {"positions": together, **means}
        write_json(self.folder / _MEASURED, self._measured)

    def flush(self) -> None:
        """Bring everything to the disk, the checksums last."""
        with disk_errors(self.folder):
            for number in self._shards:
                sync(self.folder / f"shard-{number:05d}.bin")
            sync(self.folder / _CHECKSUMS)

    def _window(self, number: int) -> NDArray[Any]:
        shard, place = divmod(number, self._shard_windows)
        records: NDArray[Any] = self._shard(shard)[place]
        if self._checksums[number] != _checksum(records):
            self._forget_damaged(shard)
            raise ShearlingError(
                f"The targets of window {number} in {self.folder} are damaged or missing: "
                "their checksum is wrong.",
                hint="Start the same command again: the teacher is asked again for that window. If "
                "this comes again, check the disk for errors.",
            )
        return records

    def _forget_damaged(self, shard: int) -> None:
        """Take all windows of a shard whose checksum is wrong for ones that are not there."""
        first = shard * self._shard_windows
        for place, records in enumerate(self._shard(shard)[: self._windows - first]):
            kept = self._checksums[first + place]
            if kept and kept != _checksum(records):
                self._put(_CHECKSUMS, (first + place) * kept.nbytes, bytes(kept.nbytes))

    def _shard(self, number: int) -> np.memmap[Any, np.dtype[Any]]:
        if number not in self._shards:
            path = self.folder / f"shard-{number:05d}.bin"
            shape = (self._shard_windows, self.window)
            self._shards[number] = _array(path, self.record, shape)
        return self._shards[number]


class TargetCache(WindowCache):
    """Probabilities of the next token."""

    def __init__(
        self,
        root: Path,
        identity: dict[str, Any],
        shape: TargetFormat,
        *,
        windows: int,
        window: int,
    ) -> None:
        self.format = shape
        facts = {"schema": SCHEMA, "windows": windows, "window": window, **asdict(shape)}
        super().__init__(root, {**facts, "identity": identity}, shape.record, windows, window)

    def write(self, number: int, slots_TK: NDArray[np.uint32], entropy_T: NDArray[Any]) -> None:
        """Keep one window's answers."""
        records = np.zeros(self.window, self.record)
        records["slots"], records["entropy"] = slots_TK, entropy_T
        self.keep(number, records)

    def read(self, windows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token numbers [B, T, K], weights [B, T, K], tail's mass and entropy [B, T]."""
        records = np.stack([self._window(number) for number in windows])
        ids, weights, tail = unpack(records["slots"], self.format)
        return ids, weights, tail, torch.from_numpy(records["entropy"].copy())


_BLOCK = 64
"""Hidden dims that share a scale: a few dims are a thousand times larger than the others."""


def pack_hidden(states_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states in 8 bits, [T, E], and a scale for every 64 dims, [T, ceil(E / 64)] float16."""
    length, size = states_TE.shape
    padded = torch.nn.functional.pad(states_TE.float(), (0, -size % _BLOCK))
    blocks = padded.view(length, -1, _BLOCK)
    # The smallest normal float16 keeps a block of zeros from being divided by zero.
    scale = (blocks.abs().amax(-1) / 127).clamp(6.2e-5, 65504).half()
    codes = (blocks / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    return codes.view(length, -1)[:, :size], scale


def unpack_hidden(codes_TE: Tensor, scale_TS: Tensor) -> Tensor:
    """What `pack_hidden` kept, [..., T, E] in float32."""
    spread = scale_TS.float().repeat_interleave(_BLOCK, dim=-1)[..., : codes_TE.shape[-1]]
    return codes_TE.float() * spread


class HiddenCache(WindowCache):
    """Outputs of some of a teacher's layers in 8 bits: about a byte for each dim and layer."""

    def __init__(
        self,
        root: Path,
        identity: dict[str, Any],
        layers: Sequence[int],
        hidden_size: int,
        *,
        windows: int,
        window: int,
    ) -> None:
        self.layers = list(layers)
        count, scales = len(self.layers), -(-hidden_size // _BLOCK)
        record = np.dtype(
            [("codes", "i1", (count, hidden_size)), ("scale", "<f2", (count, scales))]
        )
        facts = {"schema": SCHEMA, "windows": windows, "window": window, "kind": "hidden"}
        facts |= {"layers": self.layers, "hidden_size": hidden_size, "identity": identity}
        super().__init__(root, facts, record, windows, window)

    def write(self, number: int, layers_TE: Sequence[Tensor], *, measures: bool = True) -> None:
        """Keep one window's outputs of all layers; measure their mean relative squared error."""
        records, errors = np.zeros(self.window, self.record), []
        for place, states_TE in enumerate(layers_TE):
            codes, scale = pack_hidden(states_TE)
            records["codes"][:, place], records["scale"][:, place] = codes.cpu(), scale.cpu()
            if measures and self.unmeasured:
                apart = (unpack_hidden(codes, scale) - states_TE.float()).square().sum(-1)
                errors.append(apart / states_TE.float().square().sum(-1).clamp(min=1e-12))
        self.keep(number, records)
        if errors:
            self.measure(self.window, {"hidden_error": float(torch.stack(errors).mean())})

    def read(self, windows: Sequence[int]) -> list[Tensor]:
        """The outputs of each layer, [B, T, E]."""
        records = np.stack([self._window(number) for number in windows])
        codes = torch.from_numpy(records["codes"].copy())
        scale = torch.from_numpy(records["scale"].copy())
        return list(unpack_hidden(codes, scale).unbind(-2))


def _array(
    path: Path, kind: np.dtype[Any], shape: tuple[int, ...]
) -> np.memmap[Any, np.dtype[Any]]:
    """A memory-mapped array; the file is made, sparse and zero, where it is absent."""
    size = int(np.prod(shape)) * kind.itemsize
    with disk_errors(path):
        with path.open("ab") as file:
            if file.tell() < size:
                file.truncate(size)
        return np.memmap(path, kind, "r", shape=shape)


def _checksum(records: NDArray[Any]) -> int:
    """CRC-32 with a bit above it, so that it is never 0, which means absent."""
    return zlib.crc32(records.tobytes()) | 1 << 32


Answer = Callable[[list[int]], Iterable[tuple[int, Iterable[Tensor]]]]
"""Gives for each window asked for its number and its logits, in parts [n, V] in any float dtype."""


def capture(
    cache: TargetCache,
    windows: Iterable[int],
    answer: Answer,
    *,
    seed: int,
    measures: bool = True,
    progress: Progress = silent,
) -> int:
    """Ask for those of ``windows`` that are missing, and give how many there were.

    The randomness of a sample comes from ``seed`` and the window's number alone. Of several
    processes that fill a cache, each with its part of the windows, one ``measures``.
    """
    missing = cache.missing(windows)
    for done, (number, parts) in enumerate(answer(missing), start=1):
        offset_T = torch.from_numpy(
            1 - np.random.default_rng([seed, number, 5]).random(cache.window)
        )
        packed, entropies, errors, start = [], [], [], 0
        for logits_BV in (rows_BV for part_NV in parts for rows_BV in torch.split(part_NV, _ROWS)):
            log_p_BV = logits_BV[:, : cache.format.vocabulary].float().log_softmax(-1)
            offset_B = offset_T[start : start + len(log_p_BV)]
            packed_BK, entropy_B = _summarise(log_p_BV, offset_B, cache.format)
            packed.append(packed_BK)
            entropies.append(entropy_B)
            if measures and start < cache.unmeasured:
                errors.append(measured_error(log_p_BV.cpu(), *unpack(packed_BK, cache.format)))
            start += len(log_p_BV)
        cache.write(number, np.concatenate(packed), np.concatenate(entropies))
        if errors:
            error_T2 = torch.cat(errors)
            kl, tail = error_T2.mean(0).tolist()
            cache.measure(len(error_T2), {"kl_to_live": kl, "tail_mass": tail})
        progress("targets", done, len(missing))
        if done % _FLUSHED == 0:
            cache.flush()
    cache.flush()
    return len(missing)


_FLUSHED = 1024
"""Windows after which all is brought to the disk: no more is asked again after a power cut."""
_ROWS = 64
"""Positions summarised at once: few enough for their distributions to stay in the cache."""


def _summarise(
    log_p_BV: Tensor, offset_B: Tensor, shape: TargetFormat
) -> tuple[NDArray[np.uint32], NDArray[Any]]:
    """The packed tokens, [B, K], and the entropies, [B], of some positions."""
    p_BV = log_p_BV.exp()
    if shape.kind == "sample":
        ids_BK, weights_BK = sample_tokens(p_BV, shape.slots, offset_B.to(p_BV))
    else:
        ids_BK, weights_BK = top_tokens(p_BV, shape.slots)
    # Not xlogy, which costs as much as the sample; a logit of -infinity is kept from 0 · infinity.
    entropy_B = -p_BV.mul_(log_p_BV.clamp(min=-1e4)).sum(-1)
    return pack(ids_BK, weights_BK, shape), entropy_B.cpu().numpy()


def measured_error(log_p_TV: Tensor, ids_TK: Tensor, weights_TK: Tensor, tail_T: Tensor) -> Tensor:
    """KL of what is kept to what the teacher said, and the tail's mass: [T, 2].

    With a tail the KL is that of the K + 1 outcomes: 0 but for rounding. A sample is unbiased, not
    near: its KL tells how much a single position's answer varies.
    """
    log_p_TK = log_p_TV.gather(-1, ids_TK)
    kl_T = (torch.xlogy(weights_TK, weights_TK) - weights_TK * log_p_TK).sum(-1)
    others_T = (1 - log_p_TK.exp().sum(-1)).clamp(min=1e-7)
    in_tail_T = torch.xlogy(tail_T, tail_T) - tail_T * others_T.log()
    return torch.stack([kl_T + torch.where(tail_T > 0, in_tail_T, 0), tail_T], dim=-1)
