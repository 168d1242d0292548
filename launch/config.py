"""The one schema of a run: every key a YAML file or a `key=value` override may set.

Pure: building a config touches no GPU, no network and no process group.
`config_file.py` reads YAML and overrides into it and turns its complaints into advice.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from .human_numbers import parse_count, parse_tokens, refuse_bool

# What the JSON schema says, so that a person's editor takes `64k` as well as 65536.
_Written = Annotated[str, Field(pattern=r"^[0-9][0-9_,.]*\s*[kKmMgG]?$")]
_FromOne = Annotated[int, Field(ge=1)] | _Written
_FromZero = Annotated[int, Field(ge=0)] | _Written

Tokens = Annotated[int, Field(ge=1), BeforeValidator(parse_tokens, json_schema_input_type=_FromOne)]
"""A number of tokens. `64k` is 65,536 and `1M` is 1,048,576, as context lengths are named."""

Count = Annotated[int, Field(ge=1), BeforeValidator(parse_count, json_schema_input_type=_FromOne)]
"""A number of things that are no tokens (steps, sequences). `2k` is 2,000."""

CountOrZero = Annotated[int, Field(ge=0), BeforeValidator(parse_count, json_schema_input_type=_FromZero)]
"""A `Count` that may be 0."""

Positive = Annotated[float, Field(gt=0), BeforeValidator(refuse_bool)]
"""A number above 0."""

NonNegative = Annotated[float, Field(ge=0), BeforeValidator(refuse_bool)]
"""A number, 0 or above."""

Share = Annotated[float, Field(ge=0, lt=1), BeforeValidator(refuse_bool)]
"""A part of a whole: 0 or above, below 1."""

Text = Annotated[str, Field(min_length=1)]
"""Text that says something: an empty name is a slip, most often an unset shell variable."""

PathText = Annotated[Text, AfterValidator(os.path.expanduser)]
"""A path, or a name that may be one; a shell leaves the `~` of `key=~/folder` as it is."""


class Section(BaseModel):
    """Frozen, and an unknown key is an error: a typing slip must not train for a week."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class LoraConfig(Section):
    """Low-rank adapters (peft); the base weights are frozen."""

    rank: Count = 16
    """Rank of each adapter."""
    alpha: Positive = 32.0
    """Adapter scale; the update is multiplied by alpha / rank."""
    dropout: Share = 0.0
    """Dropout on the adapters' input."""
    target_modules: Annotated[tuple[Text, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Names of the linear layers that get an adapter."""


class ModelConfig(Section):
    """What is trained."""

    name: PathText | None = None
    """Hugging Face name or folder of a checkpoint; null trains `config` from random weights."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of the Hugging Face config. With `name` they override the checkpoint's own, except that
    shapes (hidden_size, num_attention_heads, ...) must agree with it; without, they define the model."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all the weights."""


class DataConfig(Section):
    """What it is trained on. The kind of each source is told from its columns."""

    source: Text | Annotated[tuple[Text, ...], Field(min_length=1)] = "stdlib"
    """JSONL or Parquet file(s), a folder of text files, a Hugging Face dataset (name or folder), or
    `stdlib`: the running interpreter's own standard library."""
    split: Text = "train"
    """Split of a Hugging Face dataset."""
    eval_source: Text | Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Documents for evaluation; null holds out `eval_fraction` of `source`, by document."""
    eval_fraction: Share = 0.02
    """Share of the documents that is held out when there is no `eval_source`; 0 turns it off."""
    tokenizer: PathText | None = None
    """Hugging Face name or folder, or `bytes` (one token a byte); null takes the model's own."""
    pack: bool = True
    """Fill each sequence with several documents (they never attend to each other)."""
    long_documents: Literal["split", "refuse"] = "split"
    """What becomes of a document longer than `sequence.length`."""
    on_error: Literal["raise", "skip"] = "raise"
    """What becomes of a file or row that cannot be used; skipped ones are counted and reported."""
    max_documents: Count | None = None
    """Read at most this many documents of each source."""
    num_workers: Count | None = None
    """Processes that tokenise; null takes one a core, 16 at most."""
    cache_dir: PathText | None = None
    """Where token shards are kept; null is $LONGSEQ_CACHE, else ~/.cache/longseq."""


class SequenceConfig(Section):
    """How long a sequence is, and how its memory is kept small."""

    length: Tokens | Literal["max"] = 4096
    """Tokens of a packed sequence, over all GPUs that share it; `max` is the longest that the plan finds room
    for."""
    mini_sequence: bool = True
    """Run every MLP tile by tile and recompute it in backward (MST)."""
    tile_tokens: Tokens | Literal["auto"] = "auto"
    """Tokens of a mini-sequence."""
    checkpoints: Literal["auto", "none", "gpu", "host"] = "auto"
    """Stream the decoder layers, each keeping only its input: on the GPU or in pinned host memory. `auto`: on
    a GPU the plan decides whether, and where inputs wait; on a CPU from 8,192 tokens a process on."""
    checkpoint_every: Count = 1
    """Keep the input of every so many layers and rebuild the others, for less memory and more time."""
    head_groups: Count | Literal["auto"] = "auto"
    """Groups of key/value heads that a streamed layer's attention runs in, one after the other."""
    save_attention: Literal["none", "auto", "gpu", "host", "all"] = "none"
    """Keep attention's output of streamed layers, which spares its second forward: `auto`, as much as there
    is room for; `all`, on the GPU with queries, keys and values, which spares their projections too."""
    loss: Literal["cce", "mini_sequence", "logits"] = "cce"
    """LM head: cut cross-entropy, the head itself tile by tile, or the full logits (small runs only)."""
    loss_memory_mib: Count | None = None
    """MiB that the loss may take beside its gradients; null lets the method choose."""


class ParallelConfig(Section):
    """How the work is spread over processes."""

    num_gpus: Count | Literal["auto"] = "auto"
    """Processes in all, one a GPU. `auto`: every visible GPU; on a machine without one,
    `ulysses_degree` processes."""
    ulysses_degree: Count | Literal["auto"] = 1
    """Processes that share one sequence (DeepSpeed-Ulysses); `auto` is for the plan to choose."""
    zero_stage: Annotated[Literal[0, 1, 2, 3, "auto"], BeforeValidator(refuse_bool)] = 0
    """What is sharded: 1 optimizer states, 2 gradients too, 3 parameters too; `auto` is for the plan."""
    offload_optimizer: Literal["none", "cpu", "auto"] = "none"
    """Where the optimizer's states and its step live (cpu needs zero_stage >= 1)."""
    offload_parameters: Literal["none", "cpu", "auto"] = "none"
    """Where the parameters wait (cpu needs zero_stage 3)."""
    deepspeed_config: PathText | dict[str, Any] | None = None
    """A DeepSpeed JSON (its path, or its keys right here) put over what is written for DeepSpeed; it may not
    contradict the other keys, and "auto" takes theirs (needs zero_stage >= 1)."""


class ApolloConfig(Section):
    """APOLLO's own settings, for `optimizer.name` apollo and apollo-mini."""

    rank: Count | None = None
    """Rank of the projections; null is 256 for apollo and 1 for apollo-mini. Matrices whose shorter side is
    not above it get AdamW."""
    update_gap: Count = 200
    """Steps for which a projection stays."""
    alpha: Positive | None = None
    """What updates are multiplied by; null is 1 for apollo and the root of 128 for apollo-mini, which are for
    pre-training. For fine-tuning the paper has 2 or 1 for apollo-mini."""
    norm_growth_limit: Annotated[float, Field(gt=1)] | None = 1.01
    """An update's norm is at most so many times the last one's; null sets no limit."""
    embeddings: Literal["low_rank", "adamw", "adamw_8bit", "factored"] = "adamw"
    """Rule of the embeddings and the LM head: AdamW, AdamW with moments in bytes, Adafactor's factored second
    moment (not with ZeRO), or projected as the other matrices."""


class OptimizerConfig(Section):
    """How weights are updated."""

    name: Literal["adamw", "apollo", "apollo-mini"] = "adamw"
    """The optimizer; apollo approximates AdamW with a few numbers a row of each matrix, apollo-mini with
    two."""
    lr: Positive = 2e-5
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: Positive | None = None
    """Added to the root of the second moment; null is 1e-8, and 1e-6 for apollo and apollo-mini."""
    apollo: ApolloConfig = Field(default_factory=ApolloConfig)
    """Settings of apollo and apollo-mini."""
    weights: Literal["float32", "bf16"] = "float32"
    """What trained weights are kept in: float32, or bf16 with stochastic rounding (apollo and apollo-mini,
    with train.precision bf16 and zero_stage 0, without LoRA)."""
    in_backward: bool = False
    """Update each weight as soon as its gradient is there and free the gradient (one process, one micro-batch
    a step, zero_stage 0). `clip_norm` then clips by the norm of the step before."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, on matrices alone (no norm, no bias)."""
    clip_norm: Positive | None = 1.0
    """Global gradient norm above which gradients are scaled down; null never clips."""


class ScheduleConfig(Section):
    """How the learning rate moves."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up."""
    final_ratio: Annotated[NonNegative, Field(le=1)] = 0.1
    """Learning rate at the last step, as a share of the peak (not for `constant`)."""


class TrainConfig(Section):
    """How long, how much at once, in which numbers."""

    steps: Count | None = None
    """Optimizer steps; null trains `epochs`."""
    epochs: Positive = 1.0
    """Passes over the data when `steps` is null."""
    global_batch_sequences: Count = 1
    """Sequences of one optimizer step, over all GPUs; the same for every number of GPUs."""
    micro_batch_sequences: Count = 1
    """Sequences that one group of `ulysses_degree` GPUs takes at once."""
    precision: Literal["float32", "bf16"] = "bf16"
    """Arithmetic of the model; trained weights are kept in float32 in either (see optimizer.weights)."""
    eval_every: Count | None = None
    """Steps between evaluations; null evaluates at the end alone."""
    eval_sequences: Count = 16
    """Sequences of one evaluation, at most."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What becomes of a step whose loss or gradient is NaN or infinite: the run stops, or goes on without the
    update. Either way the step's sequences are written to `run_dir/nonfinite.jsonl`."""
    max_nonfinite_steps: Count = 10
    """Steps that may be skipped one after the other before the run stops all the same."""
    seed: CountOrZero = 0
    """Of the weights, the order of the data and everything else random."""


class CheckpointConfig(Section):
    """What survives a run that dies."""

    every: Count | None = None
    """Steps between checkpoints; null saves at step 1, on a signal and at the end."""
    at_first_step: bool = True
    """Save after step 1, so that a save that fails does so at once."""
    keep: Count = 2
    """Newest whole checkpoints that are kept."""
    background: bool = True
    """Copy what is saved to host memory and write it while training goes on; where the host has no room for
    the copy, training waits for the writing."""
    export_at_end: bool = False
    """Write the trained model in Hugging Face's layout to `run_dir/model` when the run is done."""
    resume: PathText = "auto"
    """`auto` goes on from the run's newest checkpoint, `never` refuses a folder that has one, else a
    checkpoint's folder."""


class LogConfig(Section):
    """What is written down."""

    run_dir: PathText = "runs/default"
    """Folder of the run: checkpoints, metrics, plots, the exact config."""
    every: Count = 1
    """Steps between two lines of the log."""
    tensorboard: bool = True
    """Write tensorboard events beside metrics.jsonl."""
    wandb_project: Text | None = None
    """Log to this Weights & Biases project too (extra `wandb`)."""
    memory_history: bool = False
    """Record where GPU memory was asked for, for the snapshot that a run writes when it has no more."""


class RunConfig(Section):
    """A whole run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    sequence: SequenceConfig = Field(default_factory=SequenceConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)
