"""A tiny model, its batches, and what a training step must come to, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from longseq.distributed import ProcessGroups
    from longseq.distributed.engine import Engine

CPU = torch.device("cpu")
VOCAB = 131
MICRO_BATCHES = 4
"""Packed rows of a step, over all ranks that take different rows."""
LEARNING_RATES = (1.0, 0.5)
"""One a step: with SGD and 1.0 the first step's change of a weight is its gradient."""
_LENGTHS = (37, 20, 50, 31)
_MASKED = (9, 20, 45, 31)
"""Leading labels that carry no loss: two rows have none that does."""


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Sequence[int] | None = None
) -> Tensor:
    """Causal attention per document by a mask and a softmax, `(B, N, L, H)` from `(B, N | K, L, H)`."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    length = query.shape[2]
    token = torch.arange(length, device=query.device)
    starts = torch.tensor((offsets or (0, length))[1:-1], dtype=torch.long, device=query.device)
    document = torch.bucketize(token, starts, right=True)
    seen = (token[:, None] >= token[None]) & (document[:, None] == document[None])
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> nn.Module:
    """A Llama of two layers whose norms compute in its dtype: transformers' own are float32 inside."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 80, "vocab_size": VOCAB, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "max_position_embeddings": 256, **fields}))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                width = getattr(child.weight, "ds_shape", child.weight.shape)[0]  # born sharded it is (0,)
                setattr(parent, name, nn.RMSNorm(width, child.variance_epsilon))
    return model.to(dtype).train()


def packed_rows(step: int) -> list[dict[str, Tensor]]:
    """The rows of a step: three documents each, one of them a single token; odd lengths, uneven masks."""
    draw = torch.Generator().manual_seed(step)
    rows = []
    for length, masked in zip(_LENGTHS, _MASKED, strict=True):
        ids = torch.randint(0, VOCAB, (1, length), generator=draw)
        labels = ids.clone()
        labels[0, :masked] = -100
        offsets = torch.tensor([0, 13, 14, length], dtype=torch.int32)
        rows.append({"input_ids": ids, "labels": labels, "document_offsets": offsets})
    return rows


def plain_training(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Steps in which every document goes through the model alone; the mean losses over all labels."""
    losses = []
    for step, lr in enumerate(LEARNING_RATES):
        nll, count = torch.zeros((), dtype=next(model.parameters()).dtype), 0
        for row in packed_rows(step):
            ids, labels = row["input_ids"], row["labels"][0]
            for start, stop in row["document_offsets"].unfold(0, 2, 1).tolist():
                logits = model(input_ids=ids[:, start:stop], use_cache=False).logits[0, :-1]
                nll = nll + F.cross_entropy(logits, labels[start + 1 : stop], reduction="sum")
                count += int((labels[start + 1 : stop] != -100).sum())
        (nll / count).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        losses.append((nll / count).item())
    return losses


def engine_step(
    engine: Engine, groups: ProcessGroups, step: int, lr: float, device: torch.device = CPU
) -> tuple[float, float | None]:
    """One step of the same training through an engine, as the training loop does it: (loss, norm)."""
    from longseq.distributed import global_token_loss, shard_batch
    from longseq.distributed.loss import count_tokens

    rows = packed_rows(step)[groups.dp_rank :: groups.dp_size]
    shards = [shard_batch(row, groups) for row in rows]
    num_tokens = count_tokens([shard["shift_labels"] for shard in shards], groups, device)
    total, norm = torch.zeros((), dtype=torch.float64, device=device), None
    for shard in shards:
        shard = {
            name: value if name == "document_offsets" else value.to(device) for name, value in shard.items()
        }
        nll = engine(**shard, num_items_in_batch=1).loss
        total += nll.detach()
        engine.backward(global_token_loss(nll, num_tokens, reducer_divisor=engine.reducer_divisor))
        norm = engine.step(lr)
    return (groups.all_sum(total) / num_tokens).item(), norm


def engine_training(engine: Engine, groups: ProcessGroups, device: torch.device = CPU) -> dict[str, list]:
    """All steps of the training; losses and gradient norms."""
    steps = [engine_step(engine, groups, step, lr, device) for step, lr in enumerate(LEARNING_RATES)]
    return {"losses": [loss for loss, _ in steps], "norms": [norm for _, norm in steps]}


def prepared_llama(groups: ProcessGroups, tile_tokens: int = 10, **kwargs: Any) -> nn.Module:
    """`tiny_llama` with this library's attention and mini-sequences."""
    from longseq.distributed import apply_ulysses
    from longseq.mst import apply_mini_sequence

    model = tiny_llama(**kwargs)
    apply_ulysses(model, groups)
    apply_mini_sequence(model, tile_tokens=tile_tokens)
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every weight, by name."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}
