"""Semantic duplicates and the taught classifier on real text with the quickstart's teacher.

Run by `make bench`; some minutes. Prints for each threshold how many rewritten copies are caught
and how many texts that are no copies are lost, and for the classifier what it finds worst.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from bench_cleaning import good_texts
from planted import Planted, plant

from pipelines.recipe import load_recipe
from teachers.checkpoint import import_teacher
from teachers.encoding import Encoder
from teachers.fetch import default_cache
from teachers.judgement import Reader, alike, bad_texts, directions
from teachers.readers import Document
from teachers.settings import ClassifierSettings
from teachers.tokenizer import load_tokenizer

EACH = 25
THRESHOLDS = (0.8, 0.85, 0.9, 0.95, 0.98)


def shuffled(draw: random.Random, text: str) -> str:
    """The same sentences in another order."""
    sentences = re.split(r"(?<=[.!?])\s+", text)
    return " ".join(draw.sample(sentences, len(sentences)))


def thinned(draw: random.Random, text: str) -> str:
    """One word in seven is gone."""
    return " ".join(word for word in text.split() if draw.random() > 1 / 7)


def halved(draw: random.Random, text: str) -> str:
    """Every second sentence."""
    return " ".join(re.split(r"(?<=[.!?])\s+", text)[::2])


COPIES: dict[str, Callable[[random.Random, str], str]] = {
    "sentences in another order": shuffled,
    "one word in seven left out": thinned,
    "every second sentence": halved,
}


def open_reader(work: Path) -> tuple[Reader, Encoder]:
    import_teacher(load_recipe("quickstart").teacher, work, cache=default_cache())
    folder = work / "model"
    reader = Reader(folder, "cpu", lambda *_, **__: None)
    return reader, Encoder(load_tokenizer(folder), folder)


def test_semantic_duplicates_on_real_text(shared_data: Path, tmp_path: Path) -> None:
    reader, encoder = open_reader(tmp_path)
    texts, draw = good_texts(shared_data, 60), random.Random(0)
    documents = [Planted("good", text) for text in texts]
    for kind, change in COPIES.items():
        for number in draw.sample(range(len(texts)), EACH):
            documents.append(Planted(kind, change(draw, texts[number]), number))
    ids = [one.ids for one in encoder.batch([Document(one.text) for one in documents])]
    unit_ND = directions(reader.meanings(ids))
    print(f"\n{len(texts)} texts and {EACH} copies of each kind")
    for threshold in THRESHOLDS:
        doomed = alike(unit_ND, threshold, seed=0)
        gone = Counter(one.kind for one, lost in zip(documents, doomed, strict=True) if lost)
        caught = ", ".join(f"{kind} {gone[kind] / EACH:.0%}" for kind in COPIES)
        print(f"  cosine {threshold}: {caught}; good lost {gone['good'] / len(texts):.1%}")
    copied = [one.original for one in documents[len(texts) :]]
    own = (unit_ND[len(texts) :] * unit_ND[copied]).sum(1)
    cosine_NN = unit_ND[: len(texts)] @ unit_ND[: len(texts)].T
    others = np.quantile(cosine_NN[np.tril_indices(len(texts), -1)], [0.5, 0.99, 1])
    print(f"  copies with their originals: median {np.median(own):.3f}, least {own.min():.3f}")
    print("  other pairs: median {:.3f}, 99% {:.3f}, most {:.3f}".format(*others))
    assert np.median(own) > others[1]


def test_the_classifier_on_real_text(shared_data: Path, tmp_path: Path) -> None:
    reader, encoder = open_reader(tmp_path)
    texts = good_texts(shared_data, 60)
    documents = [d for d in plant(texts, texts[:9], EACH) if not d.kind.endswith("duplicate")]
    documents = random.Random(1).sample(documents, len(documents))
    words = [one.text for one in documents]
    ids = [one.ids for one in encoder.batch([Document(text) for text in words])]
    total = Counter(one.kind for one in documents)
    for sample in (100, len(documents)):
        bad, facts = bad_texts(
            reader,
            np.arange(len(documents)),
            lambda: words,
            lambda chosen: [ids[number] for number in chosen],
            ClassifierSettings(sample=sample, keep=0.75),
            seed=0,
        )
        gone = Counter(one.kind for one, lost in zip(documents, bad, strict=True) if lost)
        told = ", ".join(f"{kind} {gone[kind] / count:.0%}" for kind, count in total.items())
        print(f"\n  {facts}; worst quarter: {told}")
        assert 0 <= facts["heldout_auc"] <= 1
