"""Single kernels, in Triton's interpreter where there is no GPU, and how problems are cut for them."""

from __future__ import annotations

import itertools
import mmap
import sys
from types import SimpleNamespace

import pytest
import torch
from numerics import relative_error
from torch import Tensor

pytest.importorskip("triton")

from cce_problems import NAN, capped_logits, in_float64, make, skip_without_kernels, statistics_of

from longseq.cce import chunks as chunks_of
from longseq.cce import fused
from longseq.cce.head import IGNORED, Head, Needs, Tokens
from longseq.cce.kernels import labels as label_kernels
from longseq.cce.kernels import living_tiles, logits, products, rows, strips, tuning, weights
from longseq.cce.kernels.logits import RowTiles
from longseq.cce.kernels.tuning import TILE

N, V = 3 * TILE, 3 * TILE + 100  # rows and words of a product
PADDED = 4 * TILE
MIB = 2**20


@pytest.fixture
def device(kernel_device: str) -> str:
    skip_without_kernels(kernel_device)
    return kernel_device


def random(*size: int, device: str) -> Tensor:
    """Numbers of bfloat16, in the dtype that the kernels are given there."""
    return torch.randn(size).bfloat16().to(device, torch.float32 if device == "cpu" else torch.bfloat16)


def assert_close(ours: Tensor, truth: Tensor) -> None:
    narrow = ours.dtype == torch.bfloat16
    assert relative_error(ours, truth) < (4e-3 if narrow else 3e-6 if not ours.is_cuda else 1e-5)


def number(value: int, device: str) -> Tensor:
    return torch.tensor([value], dtype=torch.int32, device=device)


def living_tiles_of(alive: Tensor, count: int = N) -> living_tiles.Living:
    """As a filter finds them that sees a probability of 0.5 in living tiles, and of 0.001 in the others."""
    largest = torch.where(alive.bool(), 0.5, 0.001).repeat_interleave(TILE, 0).T.contiguous()
    return living_tiles.find_living_tiles(
        largest, None, torch.ones_like(largest[0]), number(count, alive.device), 0.01
    )


def factor(device: str) -> Tensor:
    """The left factor of the products: 0 in the columns that fill it up to whole tiles, as its makers do."""
    left = random(N, PADDED, device=device)
    left[:, V:] = 0.0
    return left


ALIVE = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]])
WAYS = ["whole", "living", "first rows", "listed rows"]


def rows_of(way: str, device: str) -> tuple[RowTiles, living_tiles.Living | None, Tensor]:
    """Tiles to do, what a filter keeps of them, and the mask `(N, PADDED)` of what is then multiplied."""
    tiles, living, mask = RowTiles(number(3, device), None, 3), None, torch.ones(3, 4)
    if way == "living":
        living, mask = living_tiles_of(ALIVE.to(device)), ALIVE.double()
    elif way == "first rows":
        tiles, mask = RowTiles(number(2, device), None, 3), torch.tensor([[1.0], [1.0], [0.0]]).expand(3, 4)
    elif way == "listed rows":
        listed = torch.tensor([2, 0, 0, 0], dtype=torch.int32, device=device)
        tiles = RowTiles(number(2, device), listed, 3)
        mask = torch.tensor([[1.0], [0.0], [1.0]]).expand(3, 4)
    return tiles, living, mask.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1).double().to(device)


@pytest.mark.parametrize("add", [False, True], ids=["write", "add"])
@pytest.mark.parametrize(("width", "splits"), [(72, 1), (264, 3), (16, 2)])
@pytest.mark.parametrize("way", WAYS)
def test_rows_product(way: str, width: int, splits: int, add: bool, device: str) -> None:
    left, right = factor(device), random(V, width, device=device)
    tiles, living, mask = rows_of(way, device)
    done = mask.any(1) if living is None else torch.ones(N, dtype=torch.bool, device=device)
    before = torch.randn(splits, N, width, device=device) if add else torch.full((splits, N, width), NAN)
    out = before.clone().to(device)
    products.rows_product(left, right, out, tiles, living=living and living.of_rows, add=add)
    expected = (left.double() * mask)[:, :V] @ right.double() + (before.double().sum(0) if add else 0.0)
    assert_close(out.sum(0)[done], expected[done])
    if not add:
        assert out[:, ~done].isnan().all()


@pytest.mark.parametrize("out_of", ["wide", "added to", "narrow"])
@pytest.mark.parametrize("width", [72, 264, 16])
@pytest.mark.parametrize("way", WAYS)
def test_columns_product(way: str, width: int, out_of: str, device: str) -> None:
    left, right = factor(device), random(N, width, device=device)
    tiles, living, mask = rows_of(way, device)
    left[~mask.any(1)] = NAN  # what is left out holds anything
    expected = (left.double().nan_to_num() * mask)[:, :V].T @ right.double()
    out = torch.full((V, width), NAN, device=device)
    if out_of == "added to":
        out.normal_()
        expected += out.double()
    elif out_of == "narrow":
        out = out.to(left.dtype)
    products.columns_product(
        left, right, out, tiles, living=living and living.of_words, add=out_of == "added to"
    )
    assert_close(out, expected)


def test_products_of_no_rows(device: str) -> None:
    """A chunk without a token that counts adds nothing, and a first one makes zeros."""
    left, right = torch.full((N, PADDED), NAN).to(factor(device)), random(N, 72, device=device)
    tiles = RowTiles(number(0, device), None, 3)
    out = torch.full((V, 72), NAN, device=device)
    products.columns_product(left, right, out, tiles)
    assert not out.any()
    out.fill_(3.0)
    products.columns_product(left, right, out, tiles, add=True)
    assert (out == 3.0).all()


def test_which_tiles_live(device: str) -> None:
    """More tiles of words than a program looks at; a NaN keeps its tile; rows past the count do not count."""
    num_tiles, count = 150, TILE + 5
    alive = (torch.rand(2, num_tiles) < 0.3).int().to(device)
    largest = torch.full((2 * TILE, num_tiles), 0.001, device=device)
    row, column = (alive[0] > 0).nonzero().squeeze(1), (alive[1] > 0).nonzero().squeeze(1)
    largest[row % TILE, row] = 0.01  # the threshold itself is enough
    largest[TILE + column % 5, column] = NAN
    largest[count:] = 1.0
    sums = torch.full((2 * TILE,), 2.0, device=device)
    largest = largest.T.contiguous()
    found = living_tiles.find_living_tiles(largest * 2.0, largest * 8.0, sums, number(count, device), 0.01)
    assert torch.equal(found.alive.int(), alive)
    dead = 1 - alive
    assert_close(found.dropped, dead * torch.tensor([[TILE], [5]], device=device) * 0.004)
    for lists, wanted in ((found.of_rows, alive), (found.of_words, alive.T)):
        assert torch.equal(lists.count, wanted.sum(1, dtype=torch.int32))
        for listed, number_of, one in zip(lists.listed, lists.count, wanted, strict=True):
            assert torch.equal(listed[:number_of].long(), one.nonzero().squeeze(1))


def test_labels_in_dead_tiles(device: str) -> None:
    """Each adds its own term to its word's row, also where several have the same word."""
    alive = ALIVE.to(device, torch.int8)
    count = 2 * TILE + 50
    words = torch.randint(0, V, (N,), device=device)
    words[10:30] = words[TILE + 3] = 200  # in tile 1: dead for both
    words[40] = -1
    of_label = torch.randn(N, device=device)
    apart = label_kernels.labels_apart(alive, words, of_label, number(count, device), V)
    token = torch.arange(N, device=device)
    is_apart = (alive[token // TILE, words.clamp(min=0) // TILE] == 0) & (token < count) & (words >= 0)
    assert is_apart[10:30].all()
    assert torch.equal(apart.elements, of_label * is_apart)
    scaled, out = random(N, 72, device=device), torch.randn(V, 72, device=device)
    expected = out.double().index_add(0, words[is_apart], (of_label.unsqueeze(1) * scaled)[is_apart].double())
    label_kernels.add_labels_apart(apart, scaled, out)
    assert_close(out, expected)


@pytest.mark.parametrize("vocab_size", [131, 777])
def test_entropy_and_best_word(vocab_size: int, device: str) -> None:
    problem = make(70, vocab_size, bias=True, ignored_hold=1.0, device=device)
    tokens, counts = problem.tokens, problem.tokens.labels != IGNORED
    tiles = RowTiles(number(1, device), None, 1)
    running = logits.log_sum_exp_strips(tokens, problem.head, tiles, need_mean=True, extras=True)
    found = strips.combine_strips(running, vocab_size, tokens.labels, None)
    truth = capped_logits(*in_float64(problem, counts)[:2])
    lse, _, mean = statistics_of(truth, tokens.labels[counts])
    p = truth.softmax(1)
    for name, true in (("lse", lse), ("mean", mean), ("entropy", -(p * p.log()).sum(1))):
        assert_close(found[name][counts], true)
    assert torch.equal(found["argmax"][counts].long(), truth.argmax(1))
    assert not any(value[~counts].any() for value in found.values())


def test_rows_of_the_weight_go_to_their_places(device: str) -> None:
    gradient, words = torch.randn(70, 72, device=device), torch.randperm(70, device=device)
    factor, scale = torch.tensor(0.3, device=device), torch.randn(70, device=device)
    scaled, moved = 0.3 * scale.unsqueeze(1) * gradient, torch.empty_like(gradient)
    moved[words] = gradient * 0.3
    for options, expected in (({}, gradient * 0.3), ({"rows": words}, moved), ({"scale": scale}, scaled)):
        out = torch.full_like(gradient, NAN, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
        weights.scale_rows(gradient, factor, out, **options)
        assert_close(out, expected)


@pytest.mark.parametrize("add", [False, True])
def test_column_sums(add: bool, device: str) -> None:
    left, scale = random(2 * TILE, PADDED, device=device), torch.randn(2 * TILE, device=device)
    left[TILE:] = NAN
    out = torch.randn(V, device=device)
    expected = scale[:TILE].double() @ left[:TILE, :V].double() + (out.double() if add else 0.0)
    weights.column_sums(left, scale, out, number(1, device), TILE, add=add)
    assert_close(out, expected)


@pytest.fixture
def far_apart(kernel_device: str) -> Tensor:
    """A float16 matrix of 5 x 300 whose rows lie 2^30 elements apart, in memory that is there when touched.

    As much lies before it: an offset that wraps around finds memory too.
    """
    if kernel_device == "cuda":
        pytest.skip("problems of this size run on a GPU as they are")
    if sys.platform != "linux":
        pytest.skip("needs memory that is not reserved")
    rows_apart, size = 2**30, 2 * (9 * 2**30)
    no_reserve = 0x4000  # MAP_NORESERVE, which older Pythons do not name
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except OSError:
        pytest.skip("needs 18 GiB of address space")
    return torch.frombuffer(memory, dtype=torch.float16).as_strided((5, 300), (rows_apart, 1), 4 * 2**30)


def test_offsets_past_2_to_the_31(far_apart: Tensor) -> None:
    """Offsets of rows are 64 bits wide: where a row is read, and where a label's element is written."""
    far_apart[:, :72] = torch.randn(5, 72)
    head = Head(torch.randn(20, 72).half())
    words = torch.randint(0, 20, (5,))
    order, count = torch.arange(5), number(5, "cpu")
    target = rows.gather_rows(Tokens(far_apart[:, :72], words), head, order, 0, count, 5)
    assert_close(target, (far_apart[:, :72].double() * head.weight[words].double()).sum(1))
    far_apart.zero_()
    lse, target, g_lse, g_target = torch.rand(4, 5)
    label_kernels.write_label_gradient(far_apart, head, words, 0, 300, lse, target, g_lse, g_target, None)
    expected = torch.zeros(5, 300).scatter_(
        1, words.unsqueeze(1), ((target - lse).exp() * g_lse + g_target).unsqueeze(1)
    )
    torch.testing.assert_close(far_apart.contiguous(), expected.half())


def test_offsets_of_exponentials_past_2_to_the_31(far_apart: Tensor) -> None:
    chunk = {
        "hidden": torch.randn(5, 72),
        "labels": torch.randint(0, 300, (5,)),
        "row_weights": torch.ones(5),
        "reference": torch.zeros(5),
        "target": torch.rand(5),
    }
    sums = torch.full((2, 5), 5.0)  # of two strips, without the label
    rows.finalize_rows(chunk, sums, number(5, "cpu"), Head(torch.empty(300, 72)), 0.0, far_apart)
    expected = torch.zeros(5, 300).scatter_(1, chunk["labels"].unsqueeze(1), -10.0)
    torch.testing.assert_close(far_apart.contiguous(), expected.half())
    far_apart.copy_(torch.randn(5, 300))
    out = torch.full((300,), NAN)
    weights.column_sums(far_apart, torch.arange(5.0), out, number(1, "cpu"), 5, add=False)
    assert_close(out, torch.arange(5.0).double() @ far_apart.double())


SHAPES = list(
    itertools.product(
        (1, 100, 1000, 4100, 65536),  # tokens
        (
            (32000, 4096),
            (50257, 1024),
            (128256, 4096),
            (256000, 2304),
            (151936, 896),
            (777, 64),
            (8192, 8192),
        ),
        (Needs(True, True), Needs(hidden=True), Needs(weight=True)),
    )
)


@pytest.mark.parametrize("memory_mib", [None, 30, 290, 1100, 2600, 20000])
def test_plan(memory_mib: int | None) -> None:
    """Chunks are whole tiles, none is needless, and the memory is kept to, unless one tile takes more."""
    for (num_tokens, (vocab_size, width), needs), filtered in itertools.product(SHAPES, (False, True)):
        chunks = chunks_of.plan(num_tokens, vocab_size, width, needs, memory_mib, filtered=filtered)
        case = f"{num_tokens} tokens, {vocab_size} x {width}, {needs}, filtered={filtered}: {chunks}"
        if chunks.defer_hidden:
            assert chunks.defer_weight, case
            continue
        size = chunks.num_tokens
        assert size % TILE == 0, case
        assert TILE <= size < num_tokens + TILE, case
        sums = 4 * vocab_size * width if needs.weight and not chunks.defer_weight else 0
        if memory_mib is None:
            assert not chunks.defer_weight, case
            budget = chunks_of.DEFAULT_MEMORY_MIB * MIB + sums
        else:
            budget = memory_mib * MIB
        if chunks.keep:
            assert size >= num_tokens, case
            sums = 0
        else:
            sums //= 2  # until backward, the gradient that is returned leaves its place free
        columns = -(-width // products.blocks_for(width).columns)
        most = tuning.max_splits(size // TILE, vocab_size, width)
        parts = tuning.splits_for(size // TILE * columns, 132, most) if needs.hidden else 0
        padded = -(-vocab_size // 256) * 256
        token = 2 * padded + 2 * width + 4 * width * parts
        token += 4 * padded // TILE if filtered and memory_mib is not None else 0
        assert size == TILE or sums + size * token <= budget, case


def test_plan_waits_where_memory_is_small() -> None:
    """A float32 sum of the weight's gradient takes 2,004 MiB here; without it, a pass more is made."""
    shape, needs = (8192, 128256, 4096), Needs(True, True)
    assert chunks_of.plan(*shape, needs, 290).defer_weight
    assert not chunks_of.plan(*shape, needs, 4000).defer_weight
    assert not chunks_of.plan(*shape, needs, None).defer_weight
    assert not chunks_of.plan(*shape, Needs(hidden=True), 290).defer_weight


@pytest.mark.parametrize("memory_mib", [None, 1, 290, 20000])
def test_words_per_chunk(memory_mib: int | None) -> None:
    for num_tokens, (vocab_size, width), needs in SHAPES:
        words = chunks_of.words_per_chunk(num_tokens, vocab_size, width, needs, memory_mib, processors=132)
        assert words % 256 == 0
        assert 256 <= words < vocab_size + 256
        if words > 256:
            sums = num_tokens * width * 4 * needs.hidden if memory_mib is not None else 0
            assert num_tokens * words * 2 + sums <= (memory_mib or chunks_of.DEFAULT_MEMORY_MIB) * MIB


def test_strips_and_splits() -> None:
    for row_tiles, word_tiles, processors in itertools.product(
        (0, 1, 9, 64, 999), (1, 3, 501, 4000), (1, 132)
    ):
        for width in (64, 4096, 16384):
            found = tuning.strips_for(row_tiles, word_tiles, width, processors)
            assert 1 <= found <= min(tuning.MAX_STRIPS, word_tiles)
        for most in (1, 3, 50):
            assert 1 <= tuning.splits_for(row_tiles, processors, most) <= min(most, 4)
    assert tuning.splits_for(1, 132, 4) == 4  # one tile would keep one program busy


def test_what_these_kernels_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything else goes another way, rather than to kernels that would fail."""

    def supports(capability: int = 9, **changes: object) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
        settings = {"shape": (10, 64), "dtype": torch.bfloat16, "is_cuda": True, "rank": None} | changes
        rank = settings.pop("rank")
        strides = {"stride": lambda dim=None: (settings["shape"][1], 1)}
        hidden = SimpleNamespace(**settings, **strides, device="cuda", data_ptr=lambda: 0)
        outer = None if rank is None else torch.empty(300, rank, dtype=torch.bfloat16)
        inner = None if rank is None else torch.empty(10, rank, dtype=torch.bfloat16)
        weight = torch.empty(300, 64, dtype=torch.bfloat16)
        return fused.supports(Tokens(hidden, torch.zeros(10), inner), Head(weight, None, outer))

    assert supports()
    assert supports(capability=10)
    assert supports(rank=8)
    assert not supports(capability=8)
    assert not supports(capability=12)
    assert not supports(is_cuda=False)
    assert not supports(dtype=torch.float16)
    assert not supports(dtype=torch.float32)
    assert not supports(shape=(10, 60))
    assert not supports(shape=(0, 64))
    assert not supports(rank=4)
