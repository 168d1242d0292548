"""`longseq doctor`: does what this machine computes agree with itself, before hours are spent on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..distributed.check import SequenceCheck, compare_with_one_rank
from ..distributed.groups import ProcessGroups
from .config import RunConfig
from .model import hf_config
from .processes import join, leave, set_up_logging

WIDTH = 8  # of a head
VOCABULARY = 512
LENGTH = 61  # odd: it must be padded for any number of ranks


def examine(config: RunConfig) -> int:
    """Run the checks on this process, alone or as one of those that a launcher started.

    Returns:
        Exit status: 0 when all is well, 1 when something is not.
    """
    groups, device = join(config.parallel.ulysses_degree, use_deepspeed=False)
    set_up_logging(groups.is_main)
    try:
        found = check_sequence_parallelism(config, groups, device)
    finally:
        leave()
    if groups.is_main:
        print("\n".join(report(found, groups)))
    return 0 if found.is_right else 1


def check_sequence_parallelism(
    config: RunConfig, groups: ProcessGroups, device: torch.device
) -> SequenceCheck:
    """The config's own architecture in small, its heads as many as they are, on packed documents."""
    from transformers import AutoModelForCausalLM

    fields = hf_config(config.model).to_dict()
    heads, kv_heads = fields["num_attention_heads"], fields.get("num_key_value_heads")
    small = {
        "hidden_size": heads * WIDTH,
        "head_dim": WIDTH,
        "intermediate_size": 2 * heads * WIDTH,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
    }
    architecture = type(hf_config(config.model))(**small)
    torch.manual_seed(config.train.seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float64)
    ids = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    labels = ids.clone()
    labels[0, : LENGTH // 3] = -100
    offsets = torch.tensor([0, 17, 18, LENGTH], dtype=torch.int32)
    batch = {"input_ids": ids, "labels": labels, "document_offsets": offsets}
    # Norms and rotary embeddings compute in float32 inside, whatever the weights' dtype.
    return compare_with_one_rank(model, groups, batch, tolerance=1e-4)


def report(found: SequenceCheck, groups: ProcessGroups) -> Sequence[str]:
    """Lines to read: what was compared, and what to do where it differs."""
    name, error = found.worst
    verdict = "ok" if found.is_right else "error"
    lines = [
        f"{verdict}: sequence parallelism over {groups.sp_size} of {groups.world_size} processes: loss "
        f"{found.loss:.6f}, of one process {found.loss_of_one:.6f}; largest difference of a gradient "
        f"{error:.1e} ({name})"
    ]
    if not found.is_right:
        why = "not a number" if math.isnan(error) else f"above {found.tolerance:.0e}"
        lines.append(
            f"  The difference is {why}: do not train like this. Try parallel.ulysses_degree=1, another "
            "version of torch, and NCCL_P2P_DISABLE=1 (a broken link between GPUs); then report it with this "
            "line and `pip freeze`."
        )
    return lines
