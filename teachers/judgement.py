"""What the teacher thinks of texts: which mean the same, and which are worth learning from.

Semantic deduplication is SemDeDup (https://arxiv.org/abs/2303.09540) on the teacher's own hidden
states; the quality classifier follows Llama 3 (https://arxiv.org/abs/2407.21783, section 3.1.1): a
model labels a sample, a small fast classifier filters everything.

Legend of shape suffixes: N documents, C documents of a group, B batch, T tokens, D hidden, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shearling import Progress, ShearlingError
from teachers.conversations import ChatTemplate, same_every_day
from teachers.model import open_model
from teachers.settings import ClassifierSettings
from teachers.tokenizer import load_tokenizer

_TOKENS = 256
"""Of a document that the teacher reads."""
_BATCH = 16
_GROUP = 4096
"""Documents compared each with each; larger sets are split by k-means first."""
_COMMON_DIRECTIONS = 2
_ROUNDS = 10
_BAD = 0.25
"""The part of the sample that the classifier is taught to find."""
_LEAST_AUC = 0.6
_WORDS, _LETTERS, _ASKED_TOKENS = 300, 6000, 768
"""Of a document that the teacher is asked about: 300 words, which are about 400 tokens; where there
are few spaces, so many letters and tokens."""

PROMPT = (
    "Is the following text well written, coherent and informative, so that one could learn from "
    "it? Answer with yes or no.\n\n{text}"
)


class Reader:
    """The teacher, reading the beginnings of documents."""

    def __init__(self, folder: Path, device: str, progress: Progress) -> None:
        self.model = open_model(folder, device)
        self.folder, self.device, self.progress = folder, device, progress

    @torch.inference_mode()
    def meanings(self, documents: list[Any]) -> NDArray[np.float32]:
        """The mean of each document's last hidden states, [N, D]."""
        mean_ND = np.zeros((len(documents), self.model.config.hidden_size), np.float32)
        for chosen, ids_BT, mask_BT in self._batches(documents, "read"):
            hidden_BTD = self.model.model(
                ids_BT, attention_mask=mask_BT, use_cache=False
            ).last_hidden_state.float()
            sum_BD = (hidden_BTD * mask_BT[..., None]).sum(1)
            mean_ND[chosen] = (sum_BD / mask_BT.sum(1, keepdim=True)).cpu().numpy()
        return mean_ND

    @torch.inference_mode()
    def losses(self, documents: list[Any]) -> NDArray[np.float64]:
        """Mean negative log-likelihood of each document's tokens but the first, in nats, [N]."""
        loss_N = np.zeros(len(documents))
        for chosen, ids_BT, mask_BT in self._batches(documents, "score"):
            logits_BTV = self.model(ids_BT, attention_mask=mask_BT, use_cache=False).logits
            loss_BT = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none"
            ).view(len(chosen), -1)
            counted_BT = mask_BT[:, 1:]
            loss_B = (loss_BT * counted_BT).sum(1) / counted_BT.sum(1).clamp(min=1)
            loss_N[chosen] = loss_B.double().cpu().numpy()
        return loss_N

    @torch.inference_mode()
    def recommendations(self, texts: list[str]) -> NDArray[np.float64]:
        """How much likelier the teacher says yes than no to `PROMPT`, in nats, [N]."""
        tokenizer = load_tokenizer(self.folder)
        if not tokenizer.chat_template:
            raise ShearlingError(
                "The teacher has no chat template, so it can't be asked what it thinks of a text.",
                hint="Set transfer_set.clean.classifier.score to perplexity.",
            )
        template = ChatTemplate(tokenizer, self.folder)
        yes, no = (
            [tokenizer.encode(word, add_special_tokens=False)[0] for word in words]
            for words in (("yes", "Yes", " yes", " Yes"), ("no", "No", " no", " No"))
        )
        score_N = np.zeros(len(texts))
        for number, text in enumerate(texts):
            self.progress("clean: ask", number, len(texts))
            shown = PROMPT.format(text=excerpt(text, template))
            messages = [{"role": "user", "content": shown}]
            ids = tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
                **same_every_day(tokenizer),
            )["input_ids"]
            logits = self.model(ids.to(self.device), use_cache=False, logits_to_keep=1).logits
            log_V = logits[0, -1].float().log_softmax(-1)
            score_N[number] = float(log_V[yes].logsumexp(0) - log_V[no].logsumexp(0))
        return score_N

    def _batches(
        self, documents: list[Any], what: str
    ) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
        """Documents of like length together: their places, ids and mask, [B, T], padded right."""
        lengths = np.array([min(len(ids), _TOKENS) for ids in documents])
        order = np.argsort(lengths, kind="stable")
        for start in range(0, order.size, _BATCH):
            self.progress(f"clean: {what}", start, order.size)
            chosen = order[start : start + _BATCH]
            ids_BT = torch.zeros(chosen.size, int(lengths[chosen].max()), dtype=torch.int64)
            mask_BT = torch.zeros_like(ids_BT)
            for row, place in enumerate(chosen):
                ids = np.asarray(documents[place][:_TOKENS], np.int64)
                ids_BT[row, : ids.size] = torch.from_numpy(ids)
                mask_BT[row, : ids.size] = 1
            yield chosen, ids_BT.to(self.device), mask_BT.to(self.device)


def excerpt(text: str, template: ChatTemplate) -> str:
    """The beginning of a document, so that it neither ends the turn that it is shown in nor, where
    its language has no spaces, is shown whole."""
    short = template.disarmed(" ".join(text.split(" ")[:_WORDS])[:_LETTERS])
    ids = template.tokenizer.encode(short, add_special_tokens=False)
    return short if len(ids) <= _ASKED_TOKENS else template.tokenizer.decode(ids[:_ASKED_TOKENS])


# --- semantic duplicates ------------------------------------------------------------------------


def same_meaning(
    reader: Reader, documents: list[Any], threshold: float, seed: int
) -> NDArray[np.bool_]:
    """Which documents mean what an earlier one of their group means already, [N]."""
    return alike(directions(reader.meanings(documents)), threshold, seed)


def directions(mean_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit vectors without what all texts share: the mean and the strongest directions.

    A language model's hidden states lie in a narrow cone; uncorrected, any two texts are alike
    (https://arxiv.org/abs/1702.01417).
    """
    centred_ND = mean_ND - mean_ND.mean(0)
    if len(centred_ND) > 8 * _COMMON_DIRECTIONS:
        gram_DD = centred_ND.T.astype(np.float64) @ centred_ND
        _, vectors_DD = np.linalg.eigh(gram_DD)
        common_DK = vectors_DD[:, -_COMMON_DIRECTIONS:].astype(np.float32)
        centred_ND = centred_ND - centred_ND @ common_DK @ common_DK.T
    norm_N1 = np.linalg.norm(centred_ND, axis=1, keepdims=True)
    unit_ND: NDArray[np.float32] = centred_ND / np.maximum(norm_N1, 1e-12)
    return unit_ND


def alike(unit_ND: NDArray[np.float32], threshold: float, seed: int) -> NDArray[np.bool_]:
    """Which rows have a cosine of at least ``threshold`` to an earlier row of their group, [N]."""
    doomed_N = np.zeros(len(unit_ND), np.bool_)
    for group in _groups(unit_ND, seed):
        cosine_CC = unit_ND[group] @ unit_ND[group].T
        earlier_CC = np.tril(cosine_CC >= threshold, k=-1)
        doomed_N[group[earlier_CC.any(axis=1)]] = True
    return doomed_N


def _groups(unit_ND: NDArray[np.float32], seed: int) -> Iterator[NDArray[np.int64]]:
    """Rows that may be alike, in groups small enough to compare each with each: k-means."""
    count = len(unit_ND)
    if count <= _GROUP:
        yield np.arange(count)
        return
    draw = np.random.default_rng([seed, 5])
    clusters = -(-4 * count // _GROUP)
    centres_KD = unit_ND[np.sort(draw.choice(count, clusters, replace=False))]
    for _ in range(_ROUNDS):
        nearest_N = _nearest(unit_ND, centres_KD)
        sums_KD = np.zeros_like(centres_KD)
        np.add.at(sums_KD, nearest_N, unit_ND)
        norm_K1 = np.linalg.norm(sums_KD, axis=1, keepdims=True)
        centres_KD = np.where(norm_K1 > 0, sums_KD / np.maximum(norm_K1, 1e-12), centres_KD)
    nearest_N = _nearest(unit_ND, centres_KD)
    for cluster in range(clusters):
        members = np.flatnonzero(nearest_N == cluster)
        for start in range(0, members.size, _GROUP):  # a crowded cluster is compared in parts
            yield members[start : start + _GROUP]


def _nearest(unit_ND: NDArray[np.float32], centres_KD: NDArray[np.float32]) -> NDArray[np.int64]:
    parts = [
        (unit_ND[start : start + _GROUP] @ centres_KD.T).argmax(axis=1)
        for start in range(0, len(unit_ND), _GROUP)
    ]
    return np.concatenate(parts)


# --- quality ------------------------------------------------------------------------------------


def bad_texts(
    reader: Reader,
    numbers: NDArray[np.int64],
    texts: Callable[[], Iterable[str]],
    beginnings: Callable[[NDArray[np.int64]], list[Any]],
    settings: ClassifierSettings,
    seed: int,
) -> tuple[NDArray[np.bool_], dict[str, Any]]:
    """Which documents a classifier taught by the teacher finds worst, [N], and facts about it.

    Where it can't tell the teacher's bad texts of a held-out fifth from the others, none is bad.
    """
    draw = np.random.default_rng([seed, 6])
    chosen = np.sort(draw.permutation(numbers.size)[: settings.sample])
    wanted = set(chosen.tolist())
    sample = [text for place, text in enumerate(texts()) if place in wanted]
    if settings.score == "prompt":
        score = reader.recommendations(sample)
    else:
        loss = reader.losses(beginnings(numbers[chosen]))
        # Too predictable is boilerplate, too surprising is noise.
        score = -np.abs(loss - np.median(loss))
    bad = score <= np.quantile(score, _BAD)
    model, auc = _taught(sample, bad, seed)
    facts: dict[str, Any] = {
        "score": settings.score,
        "sample": len(sample),
        "heldout_auc": round(auc, 3),
        "used": model is not None,
    }
    if model is None:
        return np.zeros(numbers.size, np.bool_), facts
    badness = np.concatenate([model(batch) for batch in _in_batches(texts())])
    return badness > np.quantile(badness, settings.keep), facts


def _taught(
    texts: list[str], bad: NDArray[np.bool_], seed: int
) -> tuple[Callable[[list[str]], NDArray[np.float64]] | None, float]:
    """Logistic regression on hashed words and pairs; and its area under the curve, held out.

    None if that is too small, or the texts are too few to know.
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    hashed = HashingVectorizer(n_features=1 << 18, ngram_range=(1, 2), alternate_sign=False)
    features = hashed.transform(texts)
    order = np.random.default_rng([seed, 7]).permutation(len(texts))
    held, rest = order[: len(texts) // 5], order[len(texts) // 5 :]

    def fit(places: NDArray[np.int64]) -> Any:
        model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=200)
        return model.fit(features[places], bad[places])

    auc = 0.5
    if 0 < bad[held].sum() < held.size and 0 < bad[rest].sum() < rest.size:
        auc = float(roc_auc_score(bad[held], fit(rest).decision_function(features[held])))
    if auc < _LEAST_AUC:
        return None, auc
    model = fit(order)

    def badness(batch: list[str]) -> NDArray[np.float64]:
        scores: NDArray[np.float64] = model.decision_function(hashed.transform(batch))
        return scores

    return badness, auc


def _in_batches(texts: Iterable[str], size: int = 512) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
