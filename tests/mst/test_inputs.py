"""Padding and packed documents, told by masks, position ids or offsets: nobody sees what is not theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_problems import (
    HIDDEN,
    Step,
    assert_same_step,
    cross_entropy,
    grads_of,
    make_batch,
    make_model,
    streamed_step,
    take_step,
    true_step,
)
from numerics import relative_error
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from longseq.launch.verify.truth import exact
from longseq.mst import apply_mini_sequence
from longseq.mst.inputs import document_offsets, no_mask
from longseq.mst.placement import Placement

KNOBS = [
    {"tile_tokens": 10},
    {"tile_tokens": 7, "head_groups": 4, "checkpoints": "host"},
    {"tile_tokens": 10, "head_groups": 2, "save_attention": "gpu", "checkpoints": Placement(every=2)},
]
WINDOWED = ["llama", "mistral", "gemma2"]
LENGTHS = (11, 1, 19, 6)
"""Of packed documents; two are longer than the windows, 9."""


# -- bounds ---------------------------------------------------------------------------------------------


def offsets(batch: int, length: int, **given: Any) -> list[int] | None:
    positions, mask = given.get("positions"), given.get("mask")
    found = document_offsets(
        batch,
        length,
        None if positions is None else torch.tensor(positions),
        None if mask is None else torch.tensor(mask),
    )
    assert found is None or found.device.type == "cpu"
    return None if found is None else found.tolist()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, None),
        ({"positions": [[0, 1, 2, 3]]}, None),
        ({"positions": [[7, 8, 9, 10]]}, None),
        ({"positions": [[0, 1, 0, 1]]}, [0, 2, 4, 6, 8]),  # for both rows
        ({"positions": [[0, 1, 0, 1], [0, 1, 2, 3]]}, [0, 2, 4, 8]),
        ({"positions": [[0, 0, 0, 1], [0, 1, 2, 0]]}, [0, 1, 2, 4, 7, 8]),
        ({"mask": [[1, 1, 1, 1], [1, 1, 1, 1]]}, None),
        ({"mask": [[1, 1, 0, 0], [1, 1, 1, 0]]}, None),  # on the right
        ({"mask": [[0, 0, 1, 1], [1, 1, 1, 1]]}, [0, 2, 4, 8]),
        ({"mask": [[0, 1, 1, 0], [0, 0, 0, 0]]}, [0, 1, 4, 8]),
        ({"mask": [[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]]}, [0, 2, 4, 5, 8]),
        ({"mask": [[0, 1, 1, 1], [1, 1, 1, 1]], "positions": [[0, 0, 1, 2], [0, 1, 0, 1]]}, [0, 1, 4, 6, 8]),
    ],
    ids=str,
)
def test_bounds_of_documents(given: dict, wanted: list[int] | None) -> None:
    assert offsets(2, 4, **given) == wanted


@pytest.mark.parametrize("given", [{"positions": [[3]]}, {"mask": [[1]]}, {"mask": [[0]]}], ids=str)
def test_one_token_is_one_document(given: dict) -> None:
    assert offsets(1, 1, **given) is None


@pytest.mark.parametrize("row", [[1, 0, 1, 1], [0, 1, 0, 1]])
def test_a_mask_with_a_hole_is_refused(row: list[int]) -> None:
    with pytest.raises(ValueError, match=r"attention_mask of row 1 has padding between.*position_ids"):
        offsets(2, 4, mask=[[1, 1, 1, 1], row])


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_mask \(1, 3\) must be \(2, 4\)"):
        offsets(2, 4, mask=[[1, 1, 1]])


def test_no_mask_is_one_element() -> None:
    assert no_mask(torch.device("cpu")).shape == (1, 1, 1, 1)


# -- padding --------------------------------------------------------------------------------------------


def pad(side: str) -> dict[str, Tensor]:
    """Three rows of 37, 30 and 4 tokens."""
    batch = make_batch(3)
    mask = torch.ones_like(batch["input_ids"])
    for row, padding in ((1, 7), (2, 33)):
        place = slice(0, padding) if side == "left" else slice(37 - padding, None)
        mask[row, place] = 0
        batch["input_ids"][row, place] = 0
        batch["labels"][row, place] = -100
        if side == "left":  # its logits would come from padding
            batch["labels"][row, padding] = -100
    return {**batch, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", WINDOWED)
@pytest.mark.parametrize("positions", [False, True])
def test_padding(family: str, side: str, positions: bool) -> None:
    """With the positions that transformers' generation makes of a mask, too."""
    model, batch = make_model(family), pad(side)
    if positions:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).masked_fill(
            batch["attention_mask"] == 0, 1
        )
    truth = true_step(model, batch)
    for options in KNOBS:
        assert_same_step(streamed_step(model, batch, **options), truth, what=options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_seen_by_nobody(side: str) -> None:
    model, batch = make_model(), pad(side)
    before = streamed_step(model, batch, tile_tokens=10)
    batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 5, batch["input_ids"])
    after = streamed_step(model, batch, tile_tokens=10)
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(after.loss, before.loss)
    for name in before.grads.keys() - {embeddings}:
        assert relative_error(after.grads[name], before.grads[name]) < 1e-12, name
    assert not before.grads[embeddings][0].any()  # the padding's own


@pytest.mark.parametrize("training", [False, True])
def test_a_mask_with_a_hole_is_refused_by_the_model(training: bool) -> None:
    model, batch = make_model().train(training), make_batch()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 5] = 0
    apply_mini_sequence(model, tile_tokens=10)
    with pytest.raises(ValueError, match="padding between tokens"):
        model(**batch)


def test_a_mask_of_four_dimensions_runs_the_models_own_layers() -> None:
    model, batch = make_model(), make_batch()
    batch["attention_mask"] = torch.full((37, 37), -1e30, dtype=torch.float64).triu(1)[None, None]
    batch["attention_mask"][..., 3] = -1e30
    batch["attention_mask"][..., 3, 3] = 0.0
    truth = true_step(model, batch)
    assert_same_step(streamed_step(model, batch, tile_tokens=10), truth, tolerance=1e-5)


# -- packed documents -----------------------------------------------------------------------------------


def pack(model: nn.Module) -> tuple[dict[str, Tensor], Step]:
    """One row of documents with restarting positions, and the truth: each document by itself."""
    batch = make_batch(1, masked=4)
    first_labels = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
    batch["labels"][0, first_labels] = -100  # predicted from another document
    batch["position_ids"] = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    num_items = int((batch["labels"][:, 1:] != -100).sum())
    true, total = exact(model), torch.zeros((), dtype=torch.float64)
    for ids, labels in zip(
        *(batch[name].split(LENGTHS, dim=1) for name in ("input_ids", "labels")), strict=True
    ):
        loss = cross_entropy(true(input_ids=ids).logits, labels, num_items=num_items)
        loss.backward()
        total += loss.detach()
    return batch, Step(total, grads_of(true))


def offsets_of_lengths() -> Tensor:
    return torch.tensor((0, *LENGTHS)).cumsum(0)


@pytest.mark.parametrize("family", [*WINDOWED, "gemma3_text", "olmo2"])
def test_documents_by_positions(family: str) -> None:
    model = make_model(family)
    batch, truth = pack(model)
    for options in KNOBS:
        assert_same_step(streamed_step(model, batch, **options), truth, what=options)


@pytest.mark.parametrize("positions", [False, True])
def test_documents_by_offsets(positions: bool) -> None:
    """Rotary attention knows distances alone, so positions need not restart."""
    model = make_model()
    batch, truth = pack(model)
    if not positions:
        del batch["position_ids"]
    batch["document_offsets"] = offsets_of_lengths()
    tolerance = 1e-10 if positions else 1e-5  # angles are float32
    for options in KNOBS:
        step = streamed_step(model, batch, **options)
        assert_same_step(step, truth, tolerance=tolerance, what=options)


def test_documents_in_rows_of_a_batch() -> None:
    model = make_model()
    (batch, truth), other = pack(model), make_batch(1, masked=0)
    alone = true_step(model, other)
    counts = [int((labels[:, 1:] != -100).sum()) for labels in (batch["labels"], other["labels"])]
    shares = [count / sum(counts) for count in counts]

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return shares[0] * a + shares[1] * b

    both = {name: torch.cat([batch[name], other[name]]) for name in other}
    both["position_ids"] = torch.cat([batch["position_ids"], torch.arange(37).unsqueeze(0)])
    wanted = Step(
        mean(truth.loss, alone.loss),
        {name: mean(grad, alone.grads[name]) for name, grad in truth.grads.items()},
    )
    for options in KNOBS:
        assert_same_step(streamed_step(model, both, **options), wanted, what=options)


def test_a_document_knows_nothing_of_another() -> None:
    """With labels in the third alone, what the first says changes no bit."""
    model = make_model("mistral")
    batch, _ = pack(model)
    batch["labels"][:, :12] = batch["labels"][:, 31:] = -100
    before = streamed_step(model, batch, tile_tokens=10, head_groups=2)
    batch["input_ids"][0, :11] = torch.arange(20, 31)
    after = streamed_step(model, batch, tile_tokens=10, head_groups=2)
    assert torch.equal(after.loss, before.loss)
    assert all(torch.equal(after.grads[name], grad) for name, grad in before.grads.items())


def test_gradients_stay_within_a_document() -> None:
    model = make_model()
    batch, _ = pack(model)
    batch["labels"][:, :12] = batch["labels"][:, 31:] = -100
    embeds = torch.randn(1, 37, HIDDEN, dtype=torch.float64).requires_grad_()
    del batch["input_ids"]
    grad = streamed_step(model, {**batch, "inputs_embeds": embeds}, tile_tokens=10).grads["inputs_embeds"]
    assert grad[0, 12:30].ne(0).any(dim=1).all()
    assert not grad[0, :12].any()
    assert not grad[0, 31:].any()


def test_documents_with_padding_behind_them() -> None:
    model = make_model()
    batch, truth = pack(model)
    padded = {
        name: torch.nn.functional.pad(batch[name], (0, 5), value=fill) for name, fill in PADDING.items()
    }
    assert_same_step(streamed_step(model, padded, tile_tokens=10), truth)


PADDING = {"input_ids": 0, "labels": -100, "position_ids": 0}


def test_documents_in_logits_of_training() -> None:
    model = make_model()
    batch, truth = pack(model)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    num_items = int((batch["labels"][:, 1:] != -100).sum())
    apply_mini_sequence(model, tile_tokens=10)
    step = take_step(
        model, inputs, loss_of=lambda out: cross_entropy(out.logits, batch["labels"], num_items=num_items)
    )
    assert_same_step(step, truth)


def _packing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers' flash attention: takes no mask, and finds documents in the position ids itself."""
    assert attention_mask is None
    documents = (position_ids == 0).cumsum(-1)
    seen = (documents.unsqueeze(-1) == documents.unsqueeze(-2)).tril().unsqueeze(1)
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register("packing", _packing_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("packing", lambda *args, **kwargs: None)


@pytest.mark.parametrize("call", ["decoder", "logits in evaluation"])
def test_documents_of_an_attention_without_masks(call: str) -> None:
    """Where transformers makes no mask, layers are streamed in every call, and must know the documents."""
    model = make_model(attention="packing").eval()
    batch, _ = pack(model)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}

    def hidden(of: nn.Module) -> Tensor:
        with torch.no_grad():
            return of.model(**inputs).last_hidden_state if call == "decoder" else of(**inputs).logits

    wanted = hidden(model)
    apply_mini_sequence(model, tile_tokens=10)
    assert relative_error(hidden(model), wanted) < 1e-5
