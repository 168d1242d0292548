"""Checkpoints come back byte by byte and leave no memory behind, whatever order backward takes."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from longseq.mst.checkpoint_store import CheckpointStore, Fetched, Kept
from longseq.mst.pinned_slab import PinnedSlab

BLOCK = 4096
DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def same_bytes(ours: Tensor, theirs: Tensor) -> bool:
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return False
    views = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (ours, theirs)]
    return torch.equal(*views)


@pytest.fixture
def store() -> CheckpointStore:
    return CheckpointStore(PinnedSlab(block_bytes=BLOCK))


def in_use(store: CheckpointStore) -> int:
    """Bytes of the slab that somebody holds."""
    gc.collect()
    return store.slab.total_bytes - store.slab.free_bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 3), (5,), (5, 0), (7, 3, 5), (131, 129), (33, 2, 1, 9)])
def test_what_comes_back_is_what_went(
    store: CheckpointStore, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, dtype=dtype)
    if x.numel() > 2:
        x.view(-1)[:2] = torch.tensor([torch.nan, -0.0])
    kept = store.keep(x.clone().requires_grad_(), None)
    for _ in range(2):
        fetched = store.fetch(kept)
        fetched.wait(shape[0] // 2)
        assert same_bytes(fetched.whole(), x)
        assert not fetched.tensor.requires_grad
    assert (kept.shape, kept.dtype) == (x.shape, x.dtype)


def test_later_writes_to_the_source_do_not_matter(store: CheckpointStore) -> None:
    x = torch.randn(50, 60)
    kept, before = store.keep(x), x.clone()
    kept.settle()
    x.zero_()
    assert same_bytes(store.fetch(kept).whole(), before)


def keep_layers(store: CheckpointStore, layers: list[Tensor]) -> list[Kept]:
    chain: list[Kept] = []
    for x in layers:
        chain.append(store.keep(x, chain[-1] if chain else None))
    return chain


@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 34, 100])
@pytest.mark.parametrize("released", [0.0, 0.4, 1.0])
def test_one_buffer_serves_all_layers(store: CheckpointStore, num_rows: int, released: float) -> None:
    layers = [torch.randn(num_rows, 37) for _ in range(4)]
    chain = keep_layers(store, layers)
    stop = int(num_rows * released)
    places = []
    for kept, x in zip(chain[::-1], layers[::-1], strict=True):
        fetched = store.fetch(kept)
        assert same_bytes(fetched.whole(), x)
        places.append(fetched.tensor.data_ptr())
        for start in range(0, stop, 7):
            fetched.release(start, min(start + 7, stop))
            rest = min(start + 7, stop)
            assert same_bytes(fetched.tensor[rest:], x[rest:])
    if stop > 0:
        assert len(set(places)) == 1


def test_memory_that_was_handed_on_is_not_the_old_holders(store: CheckpointStore) -> None:
    below, above = keep_layers(store, [torch.randn(9, 4), torch.randn(9, 4)])
    old = store.fetch(above)
    old.release(0, 9)
    assert old.tensor is not None  # not handed on yet
    new = store.fetch(below)
    for use in (lambda: old.tensor, old.whole, lambda: old.wait(1), lambda: old.release(9, 9)):
        with pytest.raises(RuntimeError, match="handed to the layer below"):
            use()
    assert new.tensor is new.whole()


def test_a_buffer_that_nobody_released_is_its_holders(store: CheckpointStore) -> None:
    layers = [torch.randn(9, 4), torch.randn(9, 4)]
    below, above = keep_layers(store, layers)
    first, second = store.fetch(above), store.fetch(below)
    assert same_bytes(first.whole(), layers[1])
    assert same_bytes(second.whole(), layers[0])


def test_a_refill_is_no_change_that_autograd_sees(store: CheckpointStore) -> None:
    x = torch.randn(8, 4)
    _, above = keep_layers(store, [x, x * 2])
    fetched = store.fetch(above)
    weight = torch.ones(4, requires_grad=True)
    loss = (fetched.tensor[4:] * weight).sum()
    fetched.release(0, 4)
    loss.backward()
    assert torch.equal(weight.grad, (x * 2)[4:].sum(0))


def test_a_second_backward_over_a_part_of_the_layers(store: CheckpointStore) -> None:
    layers = [torch.randn(12, 5) for _ in range(3)]
    chain = keep_layers(store, layers)
    for index in (2, 2, 1, 2, 1, 0, 2, 1, 0):
        fetched = store.fetch(chain[index])
        assert same_bytes(fetched.whole(), layers[index])
        fetched.release(0, 12)


def test_two_passes_at_once_and_backward_in_any_order(store: CheckpointStore) -> None:
    passes = [[torch.randn(12, 5) for _ in range(3)] for _ in range(2)]
    chains = [keep_layers(store, layers) for layers in passes]
    for one, index in [(0, 2), (1, 2), (1, 0), (0, 0), (0, 1), (1, 1), (1, 0)]:
        fetched = store.fetch(chains[one][index])
        assert same_bytes(fetched.whole(), passes[one][index])
        fetched.release(0, 4)
        fetched.release(4, 12)


def test_a_layer_below_that_is_gone_is_not_prefetched(store: CheckpointStore) -> None:
    below, above = keep_layers(store, [torch.randn(12, 5), torch.randn(12, 5)])
    assert above.previous is below
    fetched, x = store.fetch(above), None
    fetched.release(0, 3)
    del below
    assert above.previous is None
    fetched.release(3, 12)
    x = store.fetch(above).whole()
    assert x.shape == (12, 5)


def test_what_cannot_be(store: CheckpointStore) -> None:
    x = torch.randn(6, 4)
    kept = store.keep(x)
    for wrong in (x.t(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="contiguous"):
            store.keep(wrong)
    with pytest.raises(ValueError, match="must agree"):
        store.keep(x.double(), kept)
    with pytest.raises(ValueError, match="must agree"):
        store.keep(x[:5], kept)
    with pytest.raises(ValueError, match="cannot go to a slab for cpu"):
        store.keep(x.to("meta"))
    fetched = store.fetch(kept)
    for stop in (-1, 7):
        with pytest.raises(ValueError, match="the 6 rows there are"):
            fetched.wait(stop)
    fetched.release(0, 2)
    for start, stop in ((0, 2), (3, 4), (2, 7), (2, 1)):
        with pytest.raises(ValueError, match="must follow one another"):
            fetched.release(start, stop)


def test_nothing_is_left_behind(store: CheckpointStore) -> None:
    def step(released: int, backward: bool) -> None:
        chain = keep_layers(store, [torch.randn(40, 30) for _ in range(5)])
        assert in_use(store) >= 5 * 40 * 30 * 4
        fetched: list[Fetched] = []
        for kept in chain[::-1] if backward else []:
            fetched.append(store.fetch(kept))
            fetched[-1].release(0, released)

    step(40, backward=True)
    warm = store.slab.total_bytes
    for released, backward in ((40, True), (13, True), (0, True), (0, False)):
        step(released, backward)
        assert in_use(store) == 0
    with pytest.raises(ZeroDivisionError):
        step(1 // 0, backward=True)
    chain = keep_layers(store, [torch.randn(40, 30) for _ in range(5)])
    store.fetch(chain.pop()).release(0, 20)  # a prefetch that nobody comes for
    del chain
    assert in_use(store) == 0
    assert store.slab.total_bytes == warm
