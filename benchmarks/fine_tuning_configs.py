"""The configs of `fine_tuning.py`, as a user would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from fine_tuning_shapes import Shape

Row = dict[str, Any]


def write_yaml(path: Path, config: Row) -> None:
    path.write_text(yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=110))


def base_config(shape: Shape, name: str) -> Row:
    """A run of the base model: from random weights, or from the run before it."""
    names = [run.name for run in shape.base]
    number = names.index(name)
    run, is_last = shape.base[number], number == len(names) - 1
    return {
        "model": {"name": f"{names[number - 1]}-model"} if number else random_model(shape),
        "data": {
            **{"source": f"{name}.jsonl", "tokenizer": "tokenizer", "eval_fraction": 0, "cache_dir": "cache"},
            "num_workers": 1,  # these are tokens: they are read before other processes are up
        },
        # Everything is kept, nothing is computed twice: it is short, and is to be fast.
        "sequence": {
            **{"length": shape.short_length, "mini_sequence": False, "checkpoints": "none", "loss": "cce"},
        },
        "parallel": {"num_gpus": 1},
        "optimizer": {"lr": shape.base_lr, "weight_decay": 0.1},
        # What is learned comes all at once and late: no rate that has sunk by then.
        "schedule": {"warmup_steps": shape.base_warmup, "name": "cosine" if is_last else "constant"},
        "train": {
            "steps": run.steps,
            "global_batch_sequences": shape.base_batch,
            "micro_batch_sequences": shape.base_batch,
            "precision": shape.precision,
        },
        "checkpoint": {"every": max(1, run.steps // 4), "at_first_step": False},
        "log": {"run_dir": f"runs/{name}", "tensorboard": False},
    }


def random_model(shape: Shape) -> Row:
    """A Llama to begin with."""
    return {
        "config": {
            "model_type": "llama",
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            "head_dim": shape.head_dim,
            "max_position_embeddings": shape.long_length,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
            "initializer_range": shape.initializer_range,
            "tie_word_embeddings": True,
            **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
        }
    }


def long_config(shape: Shape) -> Row:
    """The run that goes on from it, at full length."""
    return {
        "model": {"name": f"{shape.base[-1].name}-model"},
        "data": {
            "source": ["long.jsonl", "long-text.jsonl"],
            **{"eval_source": "heldout.jsonl", "cache_dir": "cache"},
        },
        "sequence": {"length": shape.long_length},
        "parallel": {"num_gpus": 1},
        "optimizer": {"lr": shape.long_lr, "weight_decay": 0.01},
        "schedule": {"warmup_steps": shape.long_warmup},
        "train": {
            "steps": shape.long_steps,
            "precision": shape.precision,
            "eval_every": shape.eval_every,
            "eval_sequences": shape.heldout_documents // 2,
        },
        "checkpoint": {"every": shape.checkpoint_every},
        "log": {"run_dir": "runs/long", "tensorboard": False},
    }
