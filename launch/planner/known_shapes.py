"""Sizes of well-known checkpoints, as their config.json has them: for plans where the hub cannot be reached.

Only `longseq plan` and `longseq check` use them: training reads the checkpoint's own config.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..config import ModelConfig

ANSWER_S = 3.0


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        **more,
    }


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
    }


def _mistral(vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B": _llama(4096, 14336, 32, 32, max_position_embeddings=8192),
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 32),
    "meta-llama/Llama-3.1-70B": _llama(8192, 28672, 80, 64),
    "meta-llama/Llama-3.2-1B": _llama(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B": _llama(3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64, tied=False),
    "mistralai/Mistral-7B-v0.1": _mistral(32000, sliding_window=4096),
    "mistralai/Mistral-7B-v0.3": _mistral(32768, sliding_window=None),
}
"""By the name on the hub."""

SAME = {
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.2-1B-Instruct": "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B-Instruct": "meta-llama/Llama-3.2-3B",
    "meta-llama/Meta-Llama-3-8B-Instruct": "meta-llama/Meta-Llama-3-8B",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistralai/Mistral-7B-v0.3",
}
"""Fine-tuned ones whose sizes are those of another."""


def architecture(config: ModelConfig) -> tuple[Any, str | None]:
    """The Hugging Face config of a model, from the table where it cannot be had; and what to say of that.

    Raises:
        ValueError: It cannot be had, nor does the table have it; or shapes that are not the checkpoint's.
    """
    from ..model import hf_config, refuse_other_shapes

    if config.name is None:
        return hf_config(config), None
    shape = SHAPES.get(SAME.get(config.name, config.name))
    if shape is None or _is_here(config.name) or _hub_answers():
        return hf_config(config), None
    refuse_other_shapes(config, hf_config(config.model_copy(update={"name": None, "config": shape})))
    found = hf_config(config.model_copy(update={"name": None, "config": {**shape, **config.config}}))
    return found, f"{config.name} cannot be read here: its sizes are those that its makers published."


def _is_here(name: str) -> bool:
    """Whether a checkpoint's config is a folder's or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    return Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)


def _hub_answers() -> bool:
    """Whether the hub can be reached, within seconds: its own client tries for half a minute."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or not address.hostname:
        return False
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True
