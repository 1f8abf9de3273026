"""The other tower of Llama's vision models, as small as it can be: nothing here looks at images."""

from __future__ import annotations

from typing import Any

SMALL_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_global_layers": 1,
    "attention_heads": 2,
    "intermediate_size": 32,
    "vision_output_dim": 32,
    "image_size": 28,
    "patch_size": 14,
    "max_num_tiles": 1,
    "intermediate_layers_indices": [0],
    "supported_aspect_ratios": [[1, 1]],
}
"""``vision_config`` of an MllamaConfig."""
