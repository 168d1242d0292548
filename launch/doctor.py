"""`longseq doctor`: does what this machine computes agree with itself, before hours are spent on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..distributed.check import SequenceCheck, compare_with_one_rank
from ..distributed.groups import ProcessGroups
from ..mst.apply import apply_mini_sequence
from .config import RunConfig
from .model import hf_config
from .processes import join, leave, set_up_logging

VOCABULARY = 512
LENGTH = 61  # odd: it must be padded for any number of ranks
KEPT_FIELDS = (
    "num_attention_heads",
    "num_key_value_heads",
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_act",
    "hidden_activation",
    "query_pre_attn_scalar",
    "tie_word_embeddings",
)
"""Of the config's architecture, what does not depend on its sizes."""


class Finding(NamedTuple):
    """One check, on one group of ranks."""

    title: str
    sequence: int
    found: SequenceCheck


def examine(config: RunConfig) -> int:
    """Run the checks on this process, alone or as one of those that a launcher started.

    Returns:
        Exit status: 0 when all is well, 1 when something is not.
    """
    groups, device = join(config.parallel.ulysses_degree, use_deepspeed=False)
    set_up_logging(is_main=False)  # the findings are all there is to say
    try:
        mine = check_sequence_parallelism(config, groups, device)
        everyones: list[list[Finding]] = [mine]
        if groups.world_size > 1:
            everyones = [mine] * groups.world_size
            dist.all_gather_object(everyones, mine)
    finally:
        leave()
    findings = [finding for of_rank in everyones for finding in of_rank]
    if groups.is_main:
        print("\n".join(report(findings, groups)))
    return 0 if all(finding.found.is_right for finding in findings) else 1


def check_sequence_parallelism(
    config: RunConfig, groups: ProcessGroups, device: torch.device
) -> list[Finding]:
    """The config's family in small, with its heads, on packed documents: as written, and streamed.

    On a GPU the streamed layers run in bfloat16 too, by the kernels that training takes.
    """
    found = [
        ("float64", small_model(config, device, torch.float64), None),
        ("float64, streamed layers", small_model(config, device, torch.float64), streamed),
    ]
    if device.type == "cuda":
        found.append(
            (
                "bfloat16, streamed layers",
                small_model(config, device, torch.bfloat16, head_width=64),
                streamed,
            )
        )
    batch = make_batch(device)
    return [
        Finding(
            title, groups.dp_rank, compare_with_one_rank(model, groups, batch, TOLERANCES[model.dtype], apply)
        )
        for title, model, apply in found
    ]


TOLERANCES = {torch.float64: 1e-4, torch.bfloat16: 0.1}
"""Norms and rotary embeddings compute in float32 inside; bfloat16 itself has three digits at most."""


def small_model(
    config: RunConfig, device: torch.device, dtype: torch.dtype, head_width: int = 8
) -> nn.Module:
    """A model of the config's family with its heads, windows and caps, two layers and few weights."""
    from transformers import AutoModelForCausalLM

    architecture = hf_config(config.model)
    fields = architecture.to_dict()
    width = fields["num_attention_heads"] * head_width
    small: dict[str, Any] = {name: fields[name] for name in KEPT_FIELDS if fields.get(name) is not None}
    small |= {
        "hidden_size": width,
        "head_dim": head_width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    if fields.get("sliding_window"):
        small["sliding_window"] = LENGTH // 5
    if fields.get("layer_types"):
        small["layer_types"] = (sorted(set(fields["layer_types"])) * 2)[:2]
    torch.manual_seed(config.train.seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            type(architecture)(**small), dtype=dtype, attn_implementation="eager"
        )


def streamed(model: nn.Module) -> Callable[[], None]:
    """Put streamed layers on a model, everything of attention saved; what takes them off again."""
    return apply_mini_sequence(
        model, tile_tokens=16, checkpoints="gpu", save_attention="all", loss="logits"
    ).undo


def make_batch(device: torch.device) -> dict[str, torch.Tensor]:
    """Three documents in one row, one of them a single token, a third of the labels masked."""
    ids = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    labels = ids.clone()
    labels[0, : LENGTH // 3] = -100
    offsets = torch.tensor([0, 17, 18, LENGTH], dtype=torch.int32)
    return {"input_ids": ids, "labels": labels, "document_offsets": offsets}


def report(findings: list[Finding], groups: ProcessGroups) -> list[str]:
    """A line for each check, the worst of all sequences; and what to do where one differs."""
    lines, wrong = [], None
    for title in dict.fromkeys(finding.title for finding in findings):
        worst = max(
            (finding for finding in findings if finding.title == title),
            key=lambda finding: (not finding.found.is_right, finding.found.worst[1]),
        )
        found = worst.found
        name, error = found.worst
        where = "" if groups.dp_size == 1 else f", sequence {worst.sequence} of {groups.dp_size}"
        verdict = "ok" if found.is_right else "error"
        lines.append(
            f"{verdict}: {groups.sp_size} of {groups.world_size} processes on one "
            f"sequence ({title}{where}): loss {found.loss:.6f}, of one process {found.loss_of_one:.6f}; "
            f"largest difference of a gradient {error:.1e} ({name})"
        )
        wrong = wrong or (None if found.is_right else found)
    if wrong is not None:
        why = "not a number" if math.isnan(wrong.worst[1]) else f"above {wrong.tolerance:.0e}"
        lines.append(
            f"  The difference is {why}: do not train like this. Try parallel.ulysses_degree=1, another "
            "version of torch, and NCCL_P2P_DISABLE=1 (a broken link between GPUs); then report it with "
            "these lines and `pip freeze`."
        )
    return lines
