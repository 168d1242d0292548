"""Which runs `plan.py` measures: the keys of each, and about how long it takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import lanes

POSITIONS = 2**20

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
}
"""Those of Llama-3-8B, Llama-3.2-3B and Llama-3.2-1B, and one for a CPU."""

MINI = ("optimizer.name=apollo-mini", "optimizer.weights=bf16", "optimizer.in_backward=true")
"""Nothing of a weight but itself stays on the GPU."""


@dataclass(frozen=True)
class Setting:
    """A run.

    Attributes:
        name: What it is called.
        shape: One of `SHAPES`.
        overrides: Keys beside those that every setting has.
        gpus: It takes.
        about_s: Wall time from the start of its processes to their end, roughly: what a deadline goes by.
        saved: The weights are written as a checkpoint first and read back (adapters need one).
        steps: That are timed, where they are long; else as many as are asked for.
        document_tokens: Sequences are packed of documents of so many; None is one document a sequence.
    """

    name: str
    shape: str
    overrides: tuple[str, ...]
    gpus: int = 1
    about_s: float = 60
    saved: bool = False
    steps: int | None = None
    document_tokens: int | None = None

    def keys(self, data: str, work: str) -> list[str]:
        """All overrides of the run, over an empty config.

        Args:
            data: The file of documents.
            work: A folder for what is written.
        """
        fields = json.dumps(
            {"model_type": "llama", **SHAPES[self.shape], "max_position_embeddings": POSITIONS}
        )
        return [
            f"model.config={fields}",
            *([f"model.name={work}/{self.shape}"] if self.saved else []),
            f"data.source={data}",
            f"data.cache_dir={work}/cache",
            "data.tokenizer=bytes",
            "data.eval_fraction=0",
            "data.num_workers=1",
            f"data.pack={'true' if self.document_tokens else 'false'}",
            f"parallel.num_gpus={self.gpus}",
            "optimizer.lr=1e-6",
            "schedule.name=constant",
            "train.steps=100",
            f"log.run_dir={work}/runs/{self.name}",
            *self.overrides,
        ]


LONG = ("128k", "256k")
"""Of one GPU: steps of a minute or more."""


def _name(tokens: str) -> str:
    return f"sequence.length={tokens}"


def _mini(tokens: str, how: str, about_s: float, *keys: str) -> Setting:
    steps = 1 if tokens in LONG else None
    keys = (_name(tokens), *MINI, *keys)
    return Setting(f"8b-mini-{tokens}-{how}", "8b", keys, about_s=about_s, steps=steps)


def _adamw(shape: str, tokens: str, how: str, about_s: float, *keys: str) -> Setting:
    steps = 1 if tokens in LONG else None
    keys = (_name(tokens), *keys)
    return Setting(f"{shape}-adamw-{tokens}-{how}", shape, keys, about_s=about_s, steps=steps)


def _sharded(
    name: str, shape: str, tokens: str, stage: int, about_s: float, *keys: str, degree: int = 4, gpus: int = 4
) -> Setting:
    spread = (f"parallel.zero_stage={stage}", f"parallel.ulysses_degree={degree}")
    batch = f"train.global_batch_sequences={gpus // degree}"
    return Setting(
        f"{shape}-{name}-{tokens}",
        shape,
        (_name(tokens), *spread, batch, *keys),
        gpus,
        about_s,
        steps=1 if tokens == "256k" else None,
    )


GPU, HOST = "sequence.checkpoints=gpu", "sequence.checkpoints=host"
ALL, SAVE_GPU = "sequence.save_attention=all", "sequence.save_attention=gpu"

SETTINGS: tuple[Setting, ...] = (
    _mini("8k", "gpu", 40, GPU),
    _mini("16k", "gpu", 45, GPU),
    _mini("16k", "all", 45, GPU, ALL),
    _mini("32k", "gpu", 55, GPU),
    _mini("32k", "all", 55, GPU, ALL),
    _mini("32k", "every4", 60, GPU, "sequence.checkpoint_every=4"),
    _mini("64k", "gpu", 105, GPU),
    _mini("64k", "host", 105, HOST),
    _mini("64k", "host-save-gpu", 105, HOST, SAVE_GPU),
    _mini("64k", "all", 105, GPU, ALL),
    _mini("96k", "auto", 130, "sequence.save_attention=auto"),
    _mini("128k", "host", 150, HOST),
    _mini("128k", "gpu", 150, GPU),
    _mini("256k", "host", 430, HOST),
    _adamw("1b", "8k", "gpu", 35, GPU),
    _adamw("1b", "8k", "none", 35, "sequence.checkpoints=none"),
    _adamw("1b", "4k", "none", 35, "sequence.checkpoints=none"),
    _adamw("1b", "64k", "host", 50, HOST),
    _adamw("1b", "128k", "host", 70, HOST),
    _adamw("1b", "256k", "gpu", 160, GPU),
    _adamw("3b", "8k", "gpu", 40, GPU),
    _adamw("3b", "16k", "gpu", 40, GPU),
    _adamw("3b", "64k", "host", 80, HOST),
    _adamw("3b", "128k", "host", 110, HOST),
    Setting(
        "1b-apollo-16k-accumulate",
        "1b",
        (_name("16k"), GPU, "optimizer.name=apollo", "train.global_batch_sequences=2"),
        about_s=40,
    ),
    Setting(
        "8b-mini-64k-gpu-packed-8k",
        "8b",
        (_name("64k"), *MINI, GPU),
        about_s=75,
        document_tokens=8192,
    ),
    Setting("1b-lora-64k-gpu", "1b", (_name("64k"), GPU, "model.lora.rank=16"), about_s=60, saved=True),
    Setting("3b-lora-32k-gpu", "3b", (_name("32k"), GPU, "model.lora.rank=16"), about_s=70, saved=True),
    _sharded(
        "zero1-offload",
        *("1b", "32k", 1, 70, "parallel.offload_optimizer=cpu"),
        degree=1,
        gpus=1,
    ),
    _sharded("adamw-zero3-sp4-gpu", "8b", "64k", 3, 100, GPU),
    _sharded("adamw-zero3-sp4-all", "8b", "64k", 3, 100, GPU, ALL),
    _sharded("adamw-zero3-sp4-host", "8b", "128k", 3, 130, HOST),
    _sharded("adamw-zero3-sp4-gpu", "8b", "128k", 3, 130, GPU),
    _sharded("adamw-zero3-sp4-gpu", "8b", "256k", 3, 190, GPU),
    _sharded("mini-zero3-sp4-gpu", "8b", "64k", 3, 100, GPU, "optimizer.name=apollo-mini"),
    _sharded("adamw-zero2-dp4-gpu", "3b", "8k", 2, 70, GPU, degree=1),
    _sharded("adamw-zero1-offload-sp4", "3b", "64k", 1, 100, GPU, "parallel.offload_optimizer=cpu"),
    _sharded("adamw-zero3-sp2-dp2-gpu", "8b", "64k", 3, 130, GPU, degree=2),
)
"""A run takes those that its deadline lets it."""

TINY: tuple[Setting, ...] = (
    Setting("tiny-mini", "tiny", ("sequence.length=256", GPU, *MINI), about_s=20),
    Setting(
        "tiny-adamw-packed",
        "tiny",
        ("sequence.length=256", "train.precision=float32"),
        about_s=20,
        document_tokens=64,
    ),
    Setting("tiny-lora", "tiny", ("sequence.length=128", GPU, "model.lora.rank=4"), about_s=20, saved=True),
    Setting(
        "tiny-zero2-sp2",
        "tiny",
        ("sequence.length=256", GPU, "parallel.zero_stage=2", "parallel.ulysses_degree=2"),
        gpus=2,
        about_s=30,
    ),
)
"""For a machine without a GPU: that all of it works."""


def named(names: list[str]) -> list[Setting]:
    """Settings by name, or by the start of it followed by `*`, in the order of the list.

    Raises:
        ValueError: There is none of a name.
    """
    return lanes.named(names, (*SETTINGS, *TINY))
