"""The cache of the teacher's answers: unbiased, small, checked, and as good as the teacher."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from compress import answers
from compress.data import make_batch
from compress.distill import distill
from compress.hashed import load_hashed, save_hashed
from compress.settings import DistillSettings
from shearling import ShearlingError, file_aside, silent
from teachers.targets import (
    TargetCache,
    TargetFormat,
    capture,
    measured_error,
    pack,
    pack_hidden,
    sample_tokens,
    top_tokens,
    unpack,
    unpack_hidden,
)

VOCABULARY, WINDOW, WINDOWS = 97, 12, 9


def shape(kind: Any = "sample", slots: int = 6) -> TargetFormat:
    return TargetFormat(kind=kind, slots=slots, vocabulary=VOCABULARY)


def distributions(rows: int = 4, sharpness: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, VOCABULARY, generator=generator) * sharpness).softmax(-1)


def offsets(count: int, seed: int = 1) -> Tensor:
    return 1 - torch.rand(count, generator=torch.Generator().manual_seed(seed))


# --- the sample ------------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0, 8.0])
def test_the_sample_is_unbiased_and_top_k_is_not(sharpness: float) -> None:
    p, draws = distributions(sharpness=sharpness), 8000
    ids, weights = sample_tokens(p.repeat_interleave(draws, 0), 6, offsets(4 * draws))
    mean = torch.zeros(4 * draws, VOCABULARY).scatter_add_(1, ids, weights)
    mean = mean.view(4, draws, VOCABULARY).mean(1)
    spread = (p.clamp(max=1 / 6) / 6 / draws).sqrt()  # of one token's mean, from above
    assert ((mean - p).abs() < 6 * spread + 1e-4).all()
    top_ids, top_weights = top_tokens(p, 6)
    cut = torch.zeros_like(p).scatter(1, top_ids, top_weights)
    cut = cut / cut.sum(-1, keepdim=True)
    if 0 < sharpness < 8:
        assert (cut - p).abs().sum() > 10 * (mean - p).abs().sum()


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0, 30.0])
def test_all_slots_differ_and_weigh_one_together(sharpness: float) -> None:
    p = distributions(rows=500, sharpness=sharpness)
    ids, weights = sample_tokens(p, 6, offsets(500))
    torch.testing.assert_close(weights.sum(-1), torch.ones(500))
    live = weights > 1e-6
    for row in range(500):
        kept = ids[row][live[row]].tolist()
        assert len(set(kept)) == len(kept)


def test_likely_tokens_keep_their_own_probability() -> None:
    p = torch.full((1, VOCABULARY), 0.2 / (VOCABULARY - 2))
    p[0, 5], p[0, 40] = 0.5, 0.3
    ids, weights = sample_tokens(p, 6, offsets(1))
    kept = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    assert kept[5] == pytest.approx(0.5)
    assert kept[40] == pytest.approx(0.3)
    assert sorted(kept.values())[:4] == pytest.approx([0.05] * 4)


def test_a_certain_teacher_is_kept_without_nan() -> None:
    p = torch.zeros(2, VOCABULARY)
    p[:, 3] = 1
    ids, weights = sample_tokens(p, 6, offsets(2))
    assert ids[:, 0].tolist() == [3, 3]
    torch.testing.assert_close(weights[:, 0], torch.ones(2))
    assert weights[:, 1:].abs().max() == 0


# --- the format ------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [384, 49152, 65536, 128256, 262144])
def test_the_default_takes_60_bytes_a_token_and_loses_little(vocabulary: int) -> None:
    chosen = TargetFormat(kind="top_k", slots=14, vocabulary=vocabulary)
    assert chosen.bytes_per_token == 60
    ids = torch.randint(0, vocabulary, (100, 14), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = vocabulary - 1
    weights = torch.rand(100, 14).pow(8) / 14
    found_ids, found, tail = unpack(pack(ids, weights, chosen), chosen)
    assert torch.equal(found_ids, ids)
    torch.testing.assert_close(
        found, weights, rtol=0.001 * 2 ** (chosen.index_bits - 16), atol=1e-9
    )
    torch.testing.assert_close(tail, 1 - found.sum(-1))


# --- the cache -------------------------------------------------------------------------------


Asked = Iterator[tuple[int, Iterable[Tensor]]]


def logits_of(windows: list[int]) -> Asked:
    for number in windows:
        yield number, [distributions(rows=WINDOW, seed=number).log()]


def cache(root: Path, kind: str = "sample", **identity: Any) -> TargetCache:
    return TargetCache(
        root, {"teacher": "a", **identity}, shape(kind), windows=WINDOWS, window=WINDOW
    )


def contents(kept: TargetCache, windows: list[int]) -> list[np.ndarray[Any, Any]]:
    return [part.numpy() for part in kept.read(windows)]


def test_order_and_interruption_change_nothing(tmp_path: Path) -> None:
    whole = cache(tmp_path / "whole")
    assert capture(whole, range(WINDOWS), logits_of, seed=3) == WINDOWS
    parts = cache(tmp_path / "parts")
    capture(parts, [7, 2], logits_of, seed=3)

    def killed(windows: list[int]) -> Asked:
        yield from logits_of(windows[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(parts, range(WINDOWS), killed, seed=3)
    again = cache(tmp_path / "parts")
    assert again.missing(range(WINDOWS)) == [3, 4, 5, 6, 8]
    capture(cache(tmp_path / "parts"), [3, 4, 8, 2], logits_of, seed=3)
    capture(cache(tmp_path / "parts"), [6, 5], logits_of, seed=3)
    assert cache(tmp_path / "parts").missing(range(WINDOWS)) == []
    order = [8, 0, 3, 4, 1]
    for one, two in zip(contents(whole, order), contents(again, order), strict=True):
        assert np.array_equal(one, two)
    # What was measured is kept as well, and added to by whoever goes on.
    assert whole.measured()["kl_to_live"] > 0
    assert cache(tmp_path / "parts").measured() == pytest.approx(whole.measured(), rel=1e-5)


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    capture(cache(tmp_path), range(WINDOWS), logits_of, seed=3)
    assert capture(cache(tmp_path), range(WINDOWS), lambda windows: iter(()), seed=3) == 0


def test_so_many_positions_are_measured_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teachers.targets._MEASURED_POSITIONS", 2 * WINDOW)
    few, many = cache(tmp_path / "few", "top_k"), cache(tmp_path / "many", "top_k")
    capture(few, range(2), logits_of, seed=3)
    capture(many, range(2), logits_of, seed=3)
    capture(many, range(WINDOWS), logits_of, seed=3)
    assert many.measured() == few.measured()
    assert 0 < many.measured()["tail_mass"] < 1
    # Another process than the one that measures writes answers alone.
    silent = cache(tmp_path / "silent")
    capture(silent, range(2), logits_of, seed=3, measures=False)
    assert silent.measured() == {}


def test_a_teacher_that_says_nan_leaves_no_measure(tmp_path: Path) -> None:
    kept = cache(tmp_path, "top_k")
    capture(kept, [0], lambda _: [(0, [torch.full((WINDOW, VOCABULARY), torch.nan)])], seed=3)
    assert kept.measured() == {}


def test_another_teacher_or_format_has_another_folder(tmp_path: Path) -> None:
    folders = {
        cache(tmp_path).folder,
        cache(tmp_path, teacher="b").folder,
        cache(tmp_path, dtype="bfloat16").folder,
        cache(tmp_path, "top_k").folder,
    }
    assert len(folders) == 4


def test_a_folder_that_belongs_to_something_else_is_refused(tmp_path: Path) -> None:
    path = cache(tmp_path).folder / "targets.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "identity": {"teacher": "b"}}))
    with pytest.raises(ShearlingError, match="identity differ"):
        cache(tmp_path)


def test_a_flipped_bit_and_a_missing_window_are_refused(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    capture(kept, range(WINDOWS - 1), logits_of, seed=3)
    with pytest.raises(ShearlingError, match="window 8"):
        kept.read([8])
    shard = kept.folder / "shard-00000.bin"
    damaged = bytearray(shard.read_bytes())
    damaged[5 * WINDOW * kept.format.bytes_per_token + 1] ^= 4
    shard.write_bytes(bytes(damaged))
    with pytest.raises(ShearlingError, match="window 5") as caught:
        cache(tmp_path).read([4, 5])
    assert "same command again" in caught.value.hint


def test_after_damage_only_what_is_damaged_is_asked_again(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    capture(kept, range(WINDOWS), logits_of, seed=3)
    before = [part.copy() for part in contents(kept, list(range(WINDOWS)))]
    with (kept.folder / "shard-00000.bin").open("r+b") as shard:
        for window in (2, 6):  # as a power cut leaves what had not reached the disk
            shard.seek(window * WINDOW * kept.format.bytes_per_token)
            shard.write(bytes(WINDOW * kept.format.bytes_per_token))
    with pytest.raises(ShearlingError, match="window 6"):
        cache(tmp_path).read([6])
    again = cache(tmp_path)
    assert again.missing(range(WINDOWS)) == [2, 6]
    capture(again, range(WINDOWS), logits_of, seed=3)
    for one, two in zip(before, contents(again, list(range(WINDOWS))), strict=True):
        assert np.array_equal(one, two)


def test_logits_may_come_in_parts(tmp_path: Path) -> None:
    def in_parts(windows: list[int]) -> Asked:
        for number, (logits_TV,) in logits_of(windows):
            yield number, torch.split(logits_TV, 5)

    whole, parts = cache(tmp_path / "whole"), cache(tmp_path / "parts")
    capture(whole, [0, 1], logits_of, seed=3)
    capture(parts, [0, 1], in_parts, seed=3)
    for one, two in zip(contents(whole, [0, 1]), contents(parts, [0, 1]), strict=True):
        assert np.array_equal(one, two)


def test_many_shards_are_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cache(tmp_path / "one")
    capture(whole, range(WINDOWS), logits_of, seed=3)
    monkeypatch.setattr("teachers.targets._SHARD_BYTES", 2 * WINDOW * shape().bytes_per_token)
    many = cache(tmp_path / "many")
    capture(many, range(WINDOWS), logits_of, seed=3)
    assert len(list(many.folder.glob("shard-*.bin"))) == 5
    for one, two in zip(contents(whole, [8, 1]), contents(many, [8, 1]), strict=True):
        assert np.array_equal(one, two)


def test_the_measured_error_is_the_definition() -> None:
    p = distributions()
    ids, weights = top_tokens(p, VOCABULARY)
    exact = measured_error(p.log(), ids, weights, torch.zeros(4))
    assert exact.abs().max() < 1e-5
    ids, weights = top_tokens(p, 6)
    error = measured_error(p.log(), ids, weights * 0.5, 1 - weights.sum(-1) * 0.5)
    kept, tail = p.gather(1, ids), 1 - p.gather(1, ids).sum(-1)
    by_hand = (weights / 2 * (weights / 2 / kept).log()).sum(-1)
    by_hand += (1 - weights.sum(-1) / 2) * ((1 - weights.sum(-1) / 2) / tail).log()
    torch.testing.assert_close(error[:, 0], by_hand, rtol=1e-4, atol=1e-5)


# --- distilling with it ----------------------------------------------------------------------

BASE: dict[str, Any] = {
    "tokens": 32 * 8 * 20,
    "batch_tokens": 32 * 8,
    "learning_rate": 5e-3,
    "precision": "float32",
    "evaluate_every": 0,
}


def metrics(out: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize(("kind", "slots"), [("sample", 14), ("top_k", 64)])
def test_a_student_learns_from_the_cache_what_it_learns_live(
    kind: str,
    slots: int,
    tiny_llama: Path,
    tiny_student: Path,
    tiny_transfer_set: Path,
    tmp_path: Path,
) -> None:
    def run(name: str, **options: Any) -> dict[str, Any]:
        settings = DistillSettings(**{**BASE, **options})
        return distill(
            tiny_llama,
            tiny_student,
            tmp_path / name,
            tiny_transfer_set,
            settings,
            cache=tmp_path / "cache",
        )

    live = run("live")
    first = run("first", targets=kind, target_slots=slots)
    second = run("second", targets=kind, target_slots=slots)
    # Held-out numbers come from the whole distribution, so they are the same before any step.
    assert first["heldout_start"] == live["heldout_start"]
    end, wanted = first["heldout_end"]["heldout_kl"], live["heldout_end"]["heldout_kl"]
    gained = live["heldout_start"]["heldout_kl"] - wanted
    assert abs(end - wanted) < 0.15 * gained
    # An unbiased estimate of the KL itself, not only of its gradient.
    if kind == "sample":
        estimates, exact = (
            metrics(tmp_path / "first", "forward_kl"),
            metrics(tmp_path / "live", "forward_kl"),
        )
        assert estimates[0] == pytest.approx(exact[0], rel=0.1)
    assert first["targets"]["captured_windows"] > 0
    assert "captured_windows" not in second["targets"]
    for name in ("kl_to_live", "tail_mass"):
        assert second["targets"][name] == first["targets"][name]
        assert first["targets"][name] >= -1e-6, "0 but for rounding, where all tokens are kept"
    assert metrics(tmp_path / "first", "loss") == metrics(tmp_path / "second", "loss")


def test_one_cache_serves_other_batches_and_seeds(
    tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    def run(name: str, seed: int = 0, **options: Any) -> dict[str, Any]:
        settings = DistillSettings(**{**BASE, "targets": "sample", **options})
        out, kept = tmp_path / name, tmp_path / "cache"
        return distill(
            tiny_llama, tiny_student, out, tiny_transfer_set, settings, cache=kept, seed=seed
        )

    first = run("first", micro_batch_windows=8)
    other = run("other", micro_batch_windows=3)
    for name, value in first["heldout_start"].items():
        assert other["heldout_start"][name] == pytest.approx(value, rel=1e-5)
    losses = (metrics(tmp_path / name, "loss") for name in ("first", "other"))
    for one, two in zip(*losses, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert run("seed", seed=1)["targets"]["folder"] == first["targets"]["folder"]


def flipped(content: bytes) -> bytes:
    """Two bytes of the last tensor changed a little, as a failing disk does it."""
    return content[:-3] + bytes([content[-3] ^ 0x40, content[-2], content[-1] ^ 1])


def cut(content: bytes) -> bytes:
    return content[:-64]


def without_hash(content: bytes) -> bytes:
    """As it was kept before it carried a hash."""
    return save(load(content))


@pytest.mark.parametrize("damage", [flipped, cut, without_hash])
def test_held_out_answers_that_are_not_what_was_kept_are_asked_for_again(
    damage: Callable[[bytes], bytes],
    tiny_llama: Path,
    tiny_student: Path,
    tiny_transfer_set: Path,
    tmp_path: Path,
) -> None:
    def run(name: str) -> dict[str, Any]:
        settings = DistillSettings(**{**BASE, "tokens": 256, "targets": "sample"})
        out, kept = tmp_path / name, tmp_path / "cache"
        return distill(tiny_llama, tiny_student, out, tiny_transfer_set, settings, cache=kept)

    first = run("first")
    (file,) = (tmp_path / "cache").glob("targets/*/heldout.safetensors")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    second = run("second")
    assert second["heldout_start"] == first["heldout_start"]
    assert file.read_bytes() == whole
    assert not list(file.parent.glob(".heldout*")), "nothing is left aside"


def test_two_may_write_one_file_at_once(tmp_path: Path) -> None:
    """Runs that share a cache: what one has aside is not the other's to rename."""
    path = tmp_path / "heldout.safetensors"
    with file_aside(path) as slow:
        slow.write_bytes(b"the first, half written")
        save_hashed({"hidden": torch.arange(4.0)}, path)
        assert torch.equal(load_hashed(path)["hidden"], torch.arange(4.0))
        save_file({"hidden": torch.ones(4)}, slow)
    assert torch.equal(load_file(path)["hidden"], torch.ones(4))
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    with pytest.raises(SafetensorError, match="something else"):
        load_hashed(path)


def test_one_run_fills_a_cache_and_others_wait(tmp_path: Path) -> None:
    told: list[str] = []
    order: list[str] = []

    def wait() -> None:
        with cache(tmp_path).alone(lambda what, *_, **__: told.append(what)):
            order.append("second")

    second = threading.Thread(target=wait)
    with cache(tmp_path).alone():
        second.start()
        while not told:
            time.sleep(0.01)
        order.append("first")
    second.join(timeout=60)
    assert order == ["first", "second"]
    assert "waiting" in told[0]
    with cache(tmp_path).alone(lambda *_, **__: pytest.fail("nobody else is there")):
        pass


def test_others_go_home_when_rank_0_stops_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sends them home between stages reaches them here too."""
    monkeypatch.setattr(answers, "leads", lambda: False)
    monkeypatch.setattr(answers, "leader_says", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt), answers._alone([], silent):
        pytest.fail("nobody said go")


def test_what_another_run_asked_meanwhile_is_not_asked_again(
    tiny_llama: Path,
    tiny_student: Path,
    tiny_transfer_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(name: str) -> dict[str, Any]:
        settings = DistillSettings(**{**BASE, "tokens": 32 * 8 * 2, "targets": "sample"})
        folders = (tiny_llama, tiny_student, tmp_path / name, tiny_transfer_set)
        targets: dict[str, Any] = distill(*folders, settings, cache=tmp_path / "cache")["targets"]
        return targets

    alone = TargetCache.alone

    @contextmanager
    def after_another(kept: TargetCache, progress: Any) -> Iterator[None]:
        monkeypatch.setattr(TargetCache, "alone", alone)
        assert run("first")["captured_windows"] > 0
        with alone(kept, progress):
            yield

    monkeypatch.setattr(TargetCache, "alone", after_another)
    told = run("second")
    assert "captured_windows" not in told
    assert told["kl_to_live"] > 0, "as the other run measured it"
    assert metrics(tmp_path / "first", "loss") == metrics(tmp_path / "second", "loss")


def test_what_the_cache_does_not_keep_is_refused_with_names() -> None:
    with pytest.raises(ValidationError, match=r"reverse_kl, temperature.*live"):
        DistillSettings(tokens=1, targets="sample", reverse_kl=1.0, temperature=2.0)
    with pytest.raises(ValidationError, match=r"attention\.weight, on_policy"):
        DistillSettings(tokens=1, targets="top_k", attention={"weight": 1.0}, on_policy=0.5)
    with pytest.raises(ValidationError, match="several teachers"):
        DistillSettings(tokens=1, targets="top_k", teachers={"teacher": 1, "big": 1})


# --- hidden states ---------------------------------------------------------------------------


def test_hidden_states_in_8_bits_lose_little_even_beside_giants() -> None:
    states = torch.randn(5, 150, generator=torch.Generator().manual_seed(0))
    states[:, 70] = 3000.0
    states[2] = 0
    codes, scale = pack_hidden(states)
    assert codes.dtype == torch.int8
    assert scale.shape == (5, 3)
    found = unpack_hidden(codes, scale)
    assert torch.equal(found[2], states[2])
    largest = torch.nn.functional.pad(states, (0, 42)).view(5, 3, 64).abs().amax(-1)
    bound = (largest / 127 * 0.51 + 4e-5).repeat_interleave(64, -1)[:, :150]
    assert ((found - states).abs() <= bound).all()


def test_a_student_learns_from_kept_hidden_states_what_it_learns_live(
    tiny_llama: Path, tiny_student: Path, tiny_transfer_set: Path, tmp_path: Path
) -> None:
    chosen = tmp_path / "selection.json"
    chosen.write_text(json.dumps({"layers": [1, 3], "hidden": list(range(3, 27))}))

    def run(name: str, **options: Any) -> dict[str, Any]:
        settings = DistillSettings(**{**BASE, "hidden": {"weight": 1.0}, "tokens": 768, **options})
        folders = {"selection": chosen, "cache": tmp_path / "cache"}
        out = tmp_path / name
        return distill(tiny_llama, tiny_student, out, tiny_transfer_set, settings, **folders)

    run("live")
    kept = run("kept", targets="sample")["targets"]
    again = run("again", targets="sample", micro_batch_windows=3)["targets"]
    live, cached = (metrics(tmp_path / name, "hidden") for name in ("live", "kept"))
    assert cached[0] == pytest.approx(live[0], rel=1e-3)
    assert kept["hidden_bytes_per_token"] == 2 * (32 + 2)
    assert 0 < kept["hidden_error"] < 1e-4
    assert "captured_windows" not in again, "nothing is asked twice"
    assert again == {name: kept[name] for name in kept if name != "captured_windows"}
    assert metrics(tmp_path / "again", "hidden") == pytest.approx(cached, rel=1e-4)


def test_of_no_held_out_batch_nothing_is_said_in_the_heads_own_dtype(tmp_path: Path) -> None:
    """Of several processes one may have none left, and float32 does not multiply with bfloat16."""
    head_VE = torch.ones(5, 3, dtype=torch.bfloat16)
    batch = make_batch(torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None], head_VE.device)
    said = answers.CachedAnswers(cache(tmp_path), {}, head_VE, None).heldout(7, batch)
    assert (said.hidden_NE @ said.head_VE.T).shape == (0, 5)
