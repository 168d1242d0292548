"""Does a sequence over several processes give what one process gives, on the machine that is there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ...distributed.check import SequenceCheck, compare_with_one_rank
from ...distributed.groups import ProcessGroups
from ...mst.apply import apply_mini_sequence
from ..config import RunConfig
from ..processes import join, leave, set_up_logging
from ..verify.clone import VOCABULARY, architecture_of, small_config, small_model
from .findings import Finding, error, ok, show

LENGTH = 61  # odd: it must be padded for any number of ranks


class Comparison(NamedTuple):
    """One comparison, on one group of ranks."""

    title: str
    sequence: int
    found: SequenceCheck


def examine_together(config: RunConfig) -> int:
    """Compare on this process, alone or as one of those that a launcher started.

    Returns:
        Exit status: 0 when all is well, 1 when something is not.
    """
    config, groups, device = join(config, use_deepspeed=False)
    set_up_logging(is_main=False)  # the findings are all there is to say
    try:
        everyones = groups.gathered(check_sequence_parallelism(config, groups, device))
    finally:
        leave()
    comparisons = [comparison for of_rank in everyones for comparison in of_rank]
    if groups.is_main:
        show(report(comparisons, groups))
    return 0 if all(comparison.found.is_right for comparison in comparisons) else 1


def check_sequence_parallelism(
    config: RunConfig, groups: ProcessGroups, device: torch.device
) -> list[Comparison]:
    """The config's family in small, with its heads, on packed documents: as written, and streamed.

    On a GPU the streamed layers run in bfloat16 too, by the kernels that training takes.
    """
    architecture = architecture_of(config.model)
    small = small_config(architecture, head_width=8)
    found = [
        ("float64", small_model(small, device, torch.float64), None),
        ("float64, streamed layers", small_model(small, device, torch.float64), streamed),
    ]
    if device.type == "cuda":
        wide = small_config(architecture, head_width=64)
        found.append(("bfloat16, streamed layers", small_model(wide, device, torch.bfloat16), streamed))
    batch = make_batch(device)
    return [
        Comparison(
            title, groups.dp_rank, compare_with_one_rank(model, groups, batch, TOLERANCES[model.dtype], apply)
        )
        for title, model, apply in found
    ]


TOLERANCES = {torch.float64: 1e-4, torch.bfloat16: 0.1}
"""Norms and rotary embeddings compute in float32 inside; bfloat16 itself has three digits at most."""


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


def report(comparisons: list[Comparison], groups: ProcessGroups) -> list[Finding]:
    """A line for each comparison, the worst of all sequences; and what to do where one differs."""
    findings = []
    for title in dict.fromkeys(comparison.title for comparison in comparisons):
        worst = max(
            (comparison for comparison in comparisons if comparison.title == title),
            key=lambda comparison: (not comparison.found.is_right, comparison.found.worst[1]),
        )
        found = worst.found
        name, difference = found.worst
        where = "" if groups.dp_size == 1 else f", sequence {worst.sequence} of {groups.dp_size}"
        line = (
            f"{groups.sp_size} of {groups.world_size} processes on one sequence ({title}{where}): loss "
            f"{found.loss:.6f}, of one process {found.loss_of_one:.6f}; largest difference of a gradient "
            f"{difference:.1e} ({name})"
        )
        if found.is_right:
            findings.append(ok(line))
            continue
        why = "not a number" if math.isnan(difference) else f"above {found.tolerance:.0e}"
        findings.append(
            error(
                line,
                f"The difference is {why}: do not train like this. Try parallel.ulysses_degree=1, another "
                "version of torch, and NCCL_P2P_DISABLE=1 (a broken link between GPUs); then report it with "
                "these lines and `pip freeze`.",
            )
        )
    return findings
