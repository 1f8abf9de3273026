"""Text that the teacher writes itself, so that it can teach where there is no text to teach on.

A document begins with a token drawn from the whole vocabulary and goes on with what the teacher
says next, as in LLM-QAT (Liu et al. 2023, https://arxiv.org/abs/2305.17888, section 2.1): the
random beginning is what makes the documents differ. It ends where the teacher ends it, or at the
greatest length. Its ids are kept as they were sampled, never spelled out and tokenised again.

The documents lie in the cache folder, a file for each round of writing:

    written/KEY/written.json      what the text depends on; KEY is a hash of it
    written/KEY/round-00000.npy   [B, T] int32, a document in each row and -1 after its end

A round is a function of KEY and its number, and its file comes to be by one rename: a writer that
was killed goes on after its last whole round to the same bytes, and one that is asked for more
tokens adds to what is there.

Legend of shape suffixes: B documents of a round, T tokens, V vocabulary.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from shearling import Progress, ShearlingError, disk_errors, sha256_of_json, write_bytes, write_json
from teachers.checkpoint import Checkpoint
from teachers.encoding import Aside, Tokenised
from teachers.model import dtype_on, open_model
from teachers.readers import Document
from teachers.settings import WrittenSettings
from teachers.tokenizer import load_tokenizer

SCHEMA = 1
"""Raised when the same settings begin to mean other text."""
_NOTHING = -1
"""What stands after a document's end."""


class Author:
    """The teacher, writing rounds of documents.

    Raises:
        ShearlingError: its tokenizer has no EOS token, or documents would be longer than it can
            write.
    """

    def __init__(
        self, folder: Path, settings: WrittenSettings, window: int, *, seed: int, device: str
    ) -> None:
        self.folder, self.settings = folder, settings
        self.seed, self.device = seed, device
        self.tokenizer = load_tokenizer(folder)
        self.config: Any = Checkpoint(folder).config
        if self.tokenizer.eos_token_id is None:
            raise ShearlingError(
                f"The teacher can't write: the tokenizer in {folder} has no EOS token to end a "
                "document with.",
                hint="Set eos_token in its tokenizer_config.json.",
            )
        context = self.config.max_position_embeddings
        settings.check_context(context)
        self.length = settings.longest(window, context)

    @cached_property
    def model(self) -> LlamaForCausalLM:
        """Loaded when something is to be written that no earlier run has written."""
        model = open_model(self.folder, self.device)
        # What a teacher recommends for chatting (a top_p, a penalty) is not its distribution.
        model.generation_config = GenerationConfig()
        return model

    @cached_property
    def ends(self) -> set[int]:
        """Tokens that end a document: an instruction model has one more, for the end of a turn."""
        ends = {self.tokenizer.eos_token_id, *_listed(self.config.eos_token_id)}
        if (self.folder / "generation_config.json").is_file():
            how = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
            ends |= set(_listed(how.eos_token_id))
        return ends

    @cached_property
    def beginning(self) -> tuple[list[int], int]:
        """What stands before a document's first token, and how much of it the document keeps.

        The teacher always sees the token with which its texts began. The document has it if the
        tokenizer puts it before any text: all documents of a set begin alike.
        """
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        around = self.tokenizer("")["input_ids"]  # with some tokenizers the end is among them
        own = [token for token in around if token == begin or token != end]
        if own:
            return own, len(own)
        return [end if begin is None else begin], 0

    @cached_property
    def words(self) -> NDArray[np.int64]:
        """The tokens that text is made of: all but special ones.

        Rows that are no token are none of them: padding, and numbers that were left out.
        """
        numbers = np.array(list(self.tokenizer.get_vocab().values()), np.int64)
        numbers = numbers[numbers < self.config.vocab_size]
        return np.setdiff1d(numbers, special_tokens(self.tokenizer))

    @cached_property
    def never(self) -> list[int]:
        """What it must not write: a special token inside a text, or padding of the vocabulary."""
        allowed = np.union1d(self.words, sorted(self.ends))
        found: list[int] = np.setdiff1d(np.arange(self.config.vocab_size), allowed).tolist()
        return found

    @torch.inference_mode()
    def write(
        self, number: int, told: Callable[[int], None] = lambda tokens: None
    ) -> NDArray[np.int32]:
        """The round of this number: [B, T], `_NOTHING` after a document's end.

        ``told`` hears how many tokens of it there are, each time there are more.
        """
        model = self.model
        draw = np.random.default_rng([self.seed, number])
        before, kept = self.beginning
        start_B1 = torch.from_numpy(draw.choice(self.words, (self.settings.batch, 1)))
        before_BT = torch.tensor([before]).expand(self.settings.batch, -1)
        prompt_BT = torch.cat([before_BT, start_B1], dim=1).to(self.device)
        with torch.random.fork_rng(devices=[prompt_BT.device] if prompt_BT.is_cuda else []):
            torch.manual_seed(int(draw.integers(2**63)))
            written_BT: Tensor = model.generate(
                prompt_BT,
                attention_mask=torch.ones_like(prompt_BT),
                generation_config=self._how(self.length - kept - 1),
                logits_processor=LogitsProcessorList(
                    [
                        Greedy(prompt_BT.shape[1] + self.settings.greedy_tokens),
                        Count(sorted(self.ends), told),
                    ]
                ),
            )
        return self._ended(written_BT[:, len(before) - kept :].cpu().numpy(), kept)

    def _how(self, new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            top_k=0,
            suppress_tokens=self.never or None,
            eos_token_id=sorted(self.ends),
            pad_token_id=self.tokenizer.eos_token_id,
        )

    def _ended(self, ids_BT: NDArray[np.int64], kept: int) -> NDArray[np.int32]:
        """Each document up to its end, which is EOS whichever token the teacher took for it."""
        end_BT = np.isin(ids_BT, sorted(self.ends))
        end_BT[:, : kept + 1] = False
        over_BT = np.cumsum(end_BT, axis=1) - end_BT > 0
        ids_BT = np.where(end_BT, self.tokenizer.eos_token_id, ids_BT)
        return np.where(over_BT, _NOTHING, ids_BT).astype(np.int32)


class Greedy(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the likeliest token as long as the text is shorter than ``until`` tokens."""

    def __init__(self, until: int) -> None:
        self.until = until

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= self.until:
            return scores
        best_B1 = scores.argmax(dim=-1, keepdim=True)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(-1, best_B1, 0.0)


class Count(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing; tells after each token how many the documents have that go on."""

    def __init__(self, ends: list[int], told: Callable[[int], None]) -> None:
        self.ends, self.told, self.tokens = torch.tensor(ends), told, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.tokens += int((~torch.isin(input_ids[:, -1].cpu(), self.ends)).sum())
        self.told(self.tokens)
        return scores


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that no text is made of: those with a role, and those that are kept for one."""
    added = tokenizer.added_tokens_decoder.items()
    return sorted({*tokenizer.all_special_ids, *(n for n, token in added if token.special)})


def _listed(tokens: int | list[int] | None) -> list[int]:
    if tokens is None:
        return []
    return tokens if isinstance(tokens, list) else [tokens]


class WrittenSource:
    """The documents that the teacher writes; stands beside ``teachers.sources.Source``."""

    reserved = 0

    def __init__(
        self,
        settings: WrittenSettings,
        teacher: Path,
        cache: Path,
        *,
        window: int,
        seed: int,
        device: str,
    ) -> None:
        self.settings = settings
        self.empty = 0
        self.author = Author(teacher, settings, window, seed=seed, device=device)
        self.identity: dict[str, Any] = {
            "schema": SCHEMA,
            "teacher": Checkpoint(teacher).fingerprint(),
            "dtype": str(dtype_on(device)).removeprefix("torch."),
            "seed": seed,
            **settings.model_dump(exclude={"tokens"}),
            "length": self.author.length,
        }
        self.folder = cache / "written" / sha256_of_json(self.identity)[:24]

    def tokenise(self, path: Path, show: Progress, aside: Aside | None = None) -> Tokenised:
        """Rounds until there are as many tokens as were asked for, their ids in ``path``.

        Of a document that was ended by its length the last token becomes an EOS when it is packed,
        and ``learn`` has the student not learn that one.

        Raises:
            ShearlingError: the teacher writes nothing but blanks.
        """
        wanted, tokens = self.settings.tokens, 0
        lengths, sizes = array("q"), array("q")
        learn_path = path.with_suffix(".learn")
        if aside is not None:
            aside.restart()
        write_json(self.folder / "written.json", self.identity)
        with disk_errors(path), path.open("wb") as file, learn_path.open("wb") as learn_file:
            for number in count():
                show("write", min(tokens, wanted), wanted)
                if tokens >= wanted:
                    break

                def told(more: int, before: int = tokens) -> None:
                    show("write", min(before + more, wanted), wanted)

                found = self._readable(self._round(number, told))
                if aside is not None:
                    texts = [Document(text) for _, text in found]
                    aside.take(texts, [ids.size for ids, _ in found])
                for ids, text in found:
                    file.write(ids.astype(np.uint32).data)
                    learn_file.write(b"\1" * ids.size)
                    lengths.append(ids.size)
                    sizes.append(len(text.encode()))
                    tokens += ids.size
        length = np.array(lengths, np.int64)
        return Tokenised(
            np.memmap(path, np.uint32, "r"),
            np.cumsum(length) - length,
            length,
            np.array(sizes, np.int64),
            np.memmap(learn_path, np.uint8, "r"),
        )

    def _readable(self, ids_BT: NDArray[np.int32]) -> list[tuple[NDArray[np.int32], str]]:
        """The round's documents as ids and text, those without a word left out."""
        documents = [row[row != _NOTHING] for row in ids_BT]
        texts = self.author.tokenizer.batch_decode(documents, skip_special_tokens=True)
        found = [(ids, text) for ids, text in zip(documents, texts, strict=True) if text.strip()]
        self.empty += len(documents) - len(found)
        if not found:  # nor would the next rounds
            raise ShearlingError(
                f"The teacher can't write the transfer set: of {len(documents)} documents none "
                "has a word.",
                hint="Name text in transfer_set.sources instead of transfer_set.written.",
            )
        return found

    def _round(self, number: int, told: Callable[[int], None]) -> NDArray[np.int32]:
        path = self.folder / f"round-{number:05d}.npy"
        try:
            ids_BT: NDArray[np.int32] = np.load(path)
            if ids_BT.dtype == np.int32 and ids_BT.ndim == 2 and len(ids_BT) == self.settings.batch:
                return ids_BT
        except (OSError, ValueError, EOFError):
            pass  # not written yet, or damaged
        ids_BT = self.author.write(number, told)
        data = io.BytesIO()
        np.save(data, ids_BT)
        write_bytes(path, data.getvalue())
        return ids_BT

    def notes(self) -> list[str]:
        """How it was written, for the report."""
        settings = self.settings
        how = f"temperature {settings.temperature:g}"
        if settings.top_p < 1:
            how += f", top_p {settings.top_p:g}"
        if settings.greedy_tokens:
            how += f", the first {settings.greedy_tokens} tokens greedily"
        return [
            f"The teacher wrote this itself, from random first tokens: {how}, documents of at "
            f"most {self.author.length:,} tokens."
        ]
