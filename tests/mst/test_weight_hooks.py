"""A hook on a weight sees its whole gradient once, however many tiles there are."""

from __future__ import annotations

import pytest
import torch
from layer_problems import make_batch, make_model, take_step

from longseq.mst import apply_mini_sequence


@pytest.mark.parametrize(
    "options",
    [{"checkpoints": "none", "loss": "mini_sequence"}, {"checkpoints": "gpu"}],
    ids=["tiled MLPs and head", "streamed layers"],
)
def test_a_hook_on_a_weight_is_called_once_with_the_whole_gradient(options: dict) -> None:
    model = make_model()
    seen: dict[str, list[torch.Tensor]] = {name: [] for name, _ in model.named_parameters()}
    apply_mini_sequence(model, tile_tokens=8, **options)
    for name, param in model.named_parameters():
        param.register_hook(seen[name].append)
    found = take_step(model, make_batch())
    for name, grads in seen.items():
        assert len(grads) == 1, name
        assert torch.equal(grads[0], found.grads[name]), name
