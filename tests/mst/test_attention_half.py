"""Attention by groups of heads: of no group before is anything alive when the next is attended to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from training_samples import VOCAB, tiny_llama

from longseq.distributed import ProcessGroups
from longseq.distributed.attention import attention_backward, attention_forward
from longseq.distributed.ulysses import UlyssesAttention
from longseq.mst import apply_mini_sequence

NUM_GROUPS = 4


class Watching(UlyssesAttention):
    """Of one rank; counts what it gave for earlier groups, and is held still, as each group is begun."""

    def __init__(self) -> None:
        super().__init__(ProcessGroups())
        self.held: dict[str, list[int]] = {"forward": [], "backward": []}

    def forward_groups(self, groups: Any, options: Any, documents: Any = None) -> Iterator:
        return self._watched(
            "forward", groups, lambda group: attention_forward(*group, options, documents), 1
        )

    def backward_groups(
        self, groups: Any, options: Any, documents: Any = None, ahead: Any = None
    ) -> Iterator:
        return self._watched("backward", groups, lambda group: attention_backward(*group, options, documents))

    def _watched(
        self, name: str, groups: Any, attend: Callable[[Any], tuple[Tensor, ...]], counted: int | None = None
    ) -> Iterator:
        given: list[StorageWeakRef] = []

        def one(group: Any) -> tuple[Tensor, ...]:
            self.held[name].append(sum(not reference.expired() for reference in given))
            found = attend(group)
            given.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in found[:counted])
            return found

        return map(one, groups)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_nothing_of_a_group_before_is_alive(name: str) -> None:
    model = tiny_llama(torch.float64, num_attention_heads=8, num_key_value_heads=NUM_GROUPS)
    watching = Watching()
    for layer in model.model.layers:
        layer.self_attn.longseq_attention = watching
    apply_mini_sequence(model, tile_tokens=10, head_groups=NUM_GROUPS)
    ids = torch.arange(37)[None] % VOCAB
    model(input_ids=ids, labels=ids).loss.backward()
    held = watching.held[name]
    assert len(held) == NUM_GROUPS * len(model.model.layers) * (2 if name == "forward" else 1)
    assert held == [0] * len(held)
