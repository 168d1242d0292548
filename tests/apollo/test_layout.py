"""Where a weight's elements are: every element and every channel once, whatever the cut."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from longseq.apollo.layout import Layout, Matrices, Range

SHAPES = [(11, 6), (5, 13), (7, 7), (1, 9), (9, 1), (2, 3), (3, 5, 7), (5, 7, 3), (1, 4, 4)]
SIZES = [1, 2, 3, 4, 7]


def even_cut(numel: int, num_ranks: int) -> tuple[Range, ...]:
    step = -(-numel // num_ranks)
    return tuple(Range(min(i * step, numel), min((i + 1) * step, numel)) for i in range(num_ranks))


def layouts(shape: tuple[int, ...]) -> Iterator[Layout]:
    numel = math.prod(shape)
    for num_ranks in SIZES:
        for dim in range(1 if len(shape) > 2 else 2):
            yield Layout.chunked(shape, dim, num_ranks)
        yield Layout(shape, even_cut(numel, num_ranks))
        # As when the parameter is one of many laid end to end: some ranks have none of it, others odd parts.
        cuts = torch.randint(numel + 1, (num_ranks - 1,)).sort().values.tolist()
        yield Layout(shape, tuple(Range(*pair) for pair in itertools.pairwise([0, *cuts, numel])))


def held_by(layout: Layout, rank: int, whole: Tensor) -> Tensor:
    """What a rank has of a tensor of the weight's shape."""
    part = layout.bounds[rank]
    if layout.dim is None:
        return whole.flatten()[part.start : part.stop].clone()
    return whole.narrow(layout.dim, part.start, part.size).clone()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_in_one_rectangle(shape: tuple[int, ...]) -> None:
    for layout in layouts(shape):
        whole = torch.arange(math.prod(shape)).view(shape)
        by_matrix = whole.view(layout.matrices)
        seen = []
        for rank in range(len(layout.bounds)):
            local = held_by(layout, rank, whole)
            rectangles = layout.rectangles[rank]
            assert layout.dim is not None or len(rectangles) <= 3 * layout.matrices.count
            for one in rectangles:
                values = one.view(local)
                assert values.equal(by_matrix[one.matrix, slice(*one.rows), slice(*one.columns)])
                seen.append(values.flatten().clone())
                values.fill_(-1)
            assert local.eq(-1).all(), "views of what the rank holds, and all of it"
        assert torch.cat(seen).sort().values.equal(whole.flatten())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_channel_has_one_owner_and_what_is_shared_is_told(shape: tuple[int, ...]) -> None:
    for layout in layouts(shape):
        count, rows, columns = layout.matrices
        matrix, row, column = (
            one.view(shape)
            for one in torch.meshgrid(*(torch.arange(n) for n in layout.matrices), indexing="ij")
        )
        channel = matrix * max(rows, columns) + (row if rows >= columns else column)
        ranks = range(len(layout.bounds))
        touched = [set(held_by(layout, rank, channel).flatten().tolist()) for rank in ranks]
        for mine, (start, stop) in zip(touched, layout.touched, strict=True):
            assert (start, stop) == ((min(mine), max(mine) + 1) if mine else (start, start))
        owners = [owned for one in layout.owned for owned in range(*one)]
        assert owners == list(range(count * max(rows, columns))), "all, in the ranks' order, none twice"
        shared = [one for piece in layout.shared for one in range(*piece)]
        assert len(set(shared)) == len(shared)
        for mine, owned in zip(touched, layout.owned, strict=True):
            assert mine - set(range(*owned)) <= set(shared), "it needs their scales from their owner"


def test_owners_have_no_more_to_send_than_cut_rows() -> None:
    """Of rows cut anywhere, a rank and the next share at most one; the moments stay where the rows are."""
    layout = Layout((11, 5), even_cut(55, 3))
    assert [tuple(one) for one in layout.owned] == [(0, 4), (4, 8), (8, 11)]
    assert [tuple(one) for one in layout.shared] == [(3, 4), (7, 8)]
    rows = Layout.chunked((11, 5), 0, 3)
    assert rows.owned == rows.touched
    assert not rows.shared


def test_channels_across_ranks_are_dealt_out_evenly() -> None:
    for layout in (Layout.chunked((5, 13), 0, 3), Layout((5, 13), even_cut(65, 3))):
        assert [one.size for one in layout.owned] == [5, 5, 3]
        assert sum(one.size for one in layout.shared) == 13


def test_batches_of_matrices_are_sharded_whole() -> None:
    layout = Layout.chunked((5, 7, 3), 0, 2)
    assert [tuple(one) for one in layout.owned] == [(0, 21), (21, 35)]
    assert not layout.shared


def test_matrices() -> None:
    assert Matrices.of((2, 3, 5)) == (2, 3, 5)
    assert Matrices.of((3, 5)) == (1, 3, 5)
    tall, wide, square = Matrices.of((5, 3)), Matrices.of((3, 5)), Matrices.of((4, 4))
    assert [one.is_tall for one in (tall, wide, square)] == [True, False, True]
    assert [(one.channels, one.width) for one in (tall, wide, square)] == [(5, 3), (5, 3), (4, 4)]


def test_whole_weights_of_any_shape() -> None:
    for shape in ((), (7,), (3, 4), (2, 3, 4), (2, 3, 4, 5)):
        layout = Layout.whole(shape)
        assert layout.shape == shape
        assert len(layout.bounds) == 1
