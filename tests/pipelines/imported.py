"""What a run imports and computes once: loaded by the process from which killed runs are forked."""

from __future__ import annotations

import datasets  # noqa: F401
import torch
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

import reports.benchmark
import reports.page
import reports.tasks
import teachers.checkpoint
import teachers.transfer_set  # noqa: F401
from reports.chart import javascript

torch.set_num_threads(1)
javascript()
reports.tasks.stock_files()
