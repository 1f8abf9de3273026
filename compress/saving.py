"""Models in and out: stock Hugging Face folders, checked by opening them again."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, LlamaForCausalLM

from compress.parallel import leads, meet, processes, whole
from shearling import ShearlingError, folder_aside
from teachers.origin import copy_licences
from teachers.tokenizer import copy_tokenizer


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A Llama from a Hugging Face folder, on the device, in ``dtype``."""
    if not (folder / "config.json").is_file():
        raise ShearlingError(
            f"{folder} is no model: it has no config.json.",
            hint="Give a Hugging Face folder, with config.json and model.safetensors.",
        )
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True
    )
    return model.to(device)


def save_student(student: LlamaForCausalLM, source: Path, folder: Path) -> None:
    """Save as a stock folder in ``source``'s dtype with its tokenizer, and open it again.

    A split student is put together on rank 0, weight by weight, in the dtype in which it is saved.

    Raises:
        ShearlingError: the saved model does not answer as the one in memory does.
    """
    dtype = AutoConfig.from_pretrained(source, local_files_only=True).dtype or torch.float32
    if processes() == 1:
        _save(student, source, folder, dtype)
        return
    together = load_model(source, dtype, torch.device("cpu")) if leads() else None
    for name, weight in student.named_parameters():
        gathered = whole(weight.detach())  # by all processes, whoever keeps it
        if together is not None:
            together.get_parameter(name).data = gathered.to("cpu", dtype)
    if together is not None:
        _save(together, source, folder, dtype)
    meet()


def _save(student: LlamaForCausalLM, source: Path, folder: Path, dtype: torch.dtype) -> None:
    student.eval()
    for parameter in student.parameters():  # not .to(dtype): RoPE's frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    student.activation_checkpointing_disable()
    student.set_attn_implementation("sdpa")
    with folder_aside(folder) as aside:
        student.save_pretrained(aside)
        for file in aside.glob("*.safetensors"):
            file.chmod(0o644)  # as ``students.tensors.save_tensors`` does
        copy_tokenizer(source, aside)
        copy_licences(source, aside)
        again = load_model(aside, dtype, student.device).eval()
        probe_BT = torch.arange(student.config.vocab_size, device=student.device)[None, :64]
        # Compiled layers round in another order: the answers would differ in their last bits.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            same = torch.equal(student(probe_BT).logits, again(probe_BT).logits)
        if not same:
            raise ShearlingError(
                f"The model saved for {folder} does not answer as the one in memory.",
                hint="This is a bug in shearling or a failing disk; run the stage again.",
            )
