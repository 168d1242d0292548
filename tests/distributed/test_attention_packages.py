"""flash-attn 2 and 3: what they are told, shown with stand-ins in float64.

Themselves, where they are installed, are run by test_attention_per_head.py.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_problems import (
    PROBLEMS,
    assert_equal,
    masked,
    ours,
    per_head_of,
    plain,
    problem,
)
from flash_stand_ins import define_flash_attn_3, flash_attn_2, flash_attn_3

from longseq.distributed import flash_attention_2, flash_attention_3, flash_attention_4
from longseq.distributed.attention import attention_backward, attention_forward, choose_kernel
from longseq.distributed.attention_kernels import AttentionOptions
from longseq.distributed.per_head import PerHead

HAS_FLASH_3 = flash_attention_3.INSTALLED
BOTH = ("fa2", "fa3")


@pytest.fixture(scope="module")
def flash_3_operators() -> Any:
    if HAS_FLASH_3:
        pytest.skip("flash-attn-3 itself is installed")
    # Once: torch.ops remembers what it has looked up.
    return define_flash_attn_3()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, flash_3_operators: Any) -> None:
    """Both packages, and nothing that asks for a GPU."""
    for name, module in {**flash_attn_2(), **flash_attn_3()}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flash_attention_2, "VERSION", "2.8.3.post2")
    monkeypatch.setattr(flash_attention_3, "INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for module in (flash_attention_2, flash_attention_3):
        monkeypatch.setattr(module, "needs_low_precision_gpu", lambda query: None)


@pytest.mark.parametrize("kernel", BOTH)
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "no token"])
def test_they_are_told_a_masked_softmax(stand_ins: None, name: str, kernel: str) -> None:
    tensors, options, rules = problem(name, kernel)
    assert_equal(ours(tensors, options, rules.get("documents")), plain(tensors, **rules))


@pytest.mark.parametrize("kernel", BOTH)
@pytest.mark.parametrize("name", ["rows of a batch", "documents", "all"])
def test_sinks_are_exact(stand_ins: None, name: str, kernel: str) -> None:
    tensors, options, rules = problem(name, kernel)
    per_head = per_head_of(tensors[0].shape[1], "sinks")
    got = ours(tensors, options, rules.get("documents"), per_head)
    assert_equal(got, plain(tensors, per_head, **rules))


@pytest.mark.parametrize("kinds", [("alibi_slopes",), ("sinks", "alibi_slopes")])
@pytest.mark.parametrize("name", ["rows of a batch", "one token", "documents", "window", "all"])
def test_flash_attn_2_is_told_slopes(stand_ins: None, name: str, kinds: tuple[str, ...]) -> None:
    """With its log-sum-exp too: without a window the package would count from the first key."""
    tensors, options, rules = problem(name, "fa2")
    per_head = per_head_of(tensors[0].shape[1], *kinds)
    got = ours(tensors, options, rules.get("documents"), per_head)
    assert_equal(got, plain(tensors, per_head, **rules))
    _, lse = attention_forward(*tensors, options, _offsets(rules.get("documents")), per_head)
    _, wanted = masked(*tensors, **rules, sinks=per_head.sinks, slopes=per_head.alibi_slopes)
    torch.testing.assert_close(lse if lse.dim() == 3 else lse[None], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", BOTH)
def test_gradients_that_are_expanded_scalars_are_taken(stand_ins: None, kernel: str) -> None:
    tensors, options, _ = problem("causal", kernel)
    out, lse = attention_forward(*tensors, options)
    expanded = torch.ones((), dtype=out.dtype).expand_as(out)
    got = attention_backward(expanded, *tensors, out, lse, options)
    wanted = attention_backward(expanded.contiguous(), *tensors, out, lse, options)
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs)


def on_a_gpu(dtype: torch.dtype = torch.bfloat16, width: int = 64) -> tuple[Any, Any]:
    """Queries and keys as far as the choice may look: no values."""
    here = {"dtype": dtype, "device": torch.device("cuda"), "is_cuda": True}
    queries = SimpleNamespace(shape=(1, 8, 64, width), **here)
    return queries, SimpleNamespace(shape=(1, 2, 64, width), **here)


def _offsets(documents: tuple[int, ...] | None) -> torch.Tensor | None:
    return None if documents is None else torch.tensor(documents)


def install(monkeypatch: pytest.MonkeyPatch, *packages: str, capability: tuple[int, int]) -> None:
    """Only these packages, on such a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(flash_attention_4, "INSTALLED", "fa4" in packages)
    monkeypatch.setattr(flash_attention_3, "INSTALLED", "fa3" in packages)
    monkeypatch.setattr(flash_attention_2, "VERSION", "2.8.3" if "fa2" in packages else None)


HOPPER, AMPERE, ADA, BLACKWELL = (9, 0), (8, 0), (8, 9), (10, 0)
ALIBI = PerHead(alibi_slopes=torch.ones(8))
CHOICES = [
    (("fa2", "fa3"), HOPPER, {}, None, None, "fa3"),
    (("fa2", "fa3", "fa4"), HOPPER, {}, None, None, "fa4"),
    (("fa3",), HOPPER, {"window": 9, "softcap": 3.0}, (0, 30, 64), None, "fa3"),
    (("fa2",), HOPPER, {}, None, None, "cudnn"),
    (("fa2",), HOPPER, {"softcap": 3.0}, (0, 30, 64), None, "fa2"),
    (("fa2", "fa3"), AMPERE, {}, None, None, "flash"),
    (("fa2", "fa3"), ADA, {"softcap": 3.0}, None, None, "fa2"),
    (("fa3",), BLACKWELL, {"softcap": 3.0}, None, None, "blockwise"),
    (("fa2", "fa3", "fa4"), HOPPER, {}, None, ALIBI, "fa2"),
    (("fa3", "fa4"), HOPPER, {}, None, ALIBI, "blockwise"),
    ((), HOPPER, {}, None, PerHead(sinks=torch.ones(8)), "cudnn"),
]


@pytest.mark.parametrize(("packages", "capability", "options", "documents", "per_head", "wanted"), CHOICES)
def test_auto_takes_the_fastest_that_can(
    monkeypatch: pytest.MonkeyPatch,
    packages: tuple[str, ...],
    capability: tuple[int, int],
    options: dict,
    documents: tuple[int, ...] | None,
    per_head: PerHead | None,
    wanted: str,
) -> None:
    install(monkeypatch, *packages, capability=capability)
    asked = AttentionOptions(1.0, **options)
    name, reason = choose_kernel(*on_a_gpu(), asked, _offsets(documents), per_head)
    assert name == wanted, reason


@pytest.mark.parametrize(
    ("kernel", "packages", "capability", "sizes", "message"),
    [
        ("fa2", (), AMPERE, {}, r"not installed \(pip install flash-attn --no-build-isolation\)"),
        ("fa2", ("fa2",), (7, 5), {}, r"an Ampere GPU or newer, not compute capability 7\.5"),
        ("fa2", ("fa2",), AMPERE, {"width": 20}, "heads of a multiple of 8 up to 256, not 20"),
        ("fa2", ("fa2",), AMPERE, {"dtype": torch.float32}, "it takes bfloat16 and float16, not float32"),
        ("fa3", (), HOPPER, {}, r"not installed \(pip install flash-attn-3 --index-url https"),
        ("fa3", (), AMPERE, {}, r"it needs a Hopper GPU, not compute capability 8\.0"),
        ("fa3", ("fa3",), (12, 0), {}, r"it needs a Hopper GPU, not compute capability 12\.0"),
        ("fa3", ("fa3",), HOPPER, {"width": 264}, "up to 256, not 264"),
        ("fa4", (), AMPERE, {}, r"Hopper or Blackwell data-centre GPU, not compute capability 8\.x"),
        ("flash", (), (7, 5), {}, r"an Ampere GPU or newer, not compute capability 7\.5"),
    ],
)
def test_a_refusal_says_why(
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    packages: tuple[str, ...],
    capability: tuple[int, int],
    sizes: dict,
    message: str,
) -> None:
    install(monkeypatch, *packages, capability=capability)
    with pytest.raises(ValueError, match=f"kernel='{kernel}' cannot do this attention: .*{message}"):
        choose_kernel(*on_a_gpu(**sizes), AttentionOptions(1.0, kernel=kernel))


@pytest.mark.parametrize(("version", "fits"), [("2.6.3", False), ("2.7.0.post2", False), ("2.7.1", True)])
def test_an_old_flash_attn_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, fits: bool) -> None:
    install(monkeypatch, "fa2", capability=AMPERE)
    monkeypatch.setattr(flash_attention_2, "VERSION", version)
    options = AttentionOptions(1.0, softcap=2.0)
    name, reason = choose_kernel(*on_a_gpu(), options)
    assert name == ("fa2" if fits else "blockwise")
    assert fits or f"not fa2: it needs flash-attn 2.7.1 or newer, not {version}" in reason


@pytest.mark.parametrize(
    ("kernel", "module", "message"),
    [
        ("fa2", "flash_attn", "flash-attn is installed but cannot be imported .*attention_kernel='flash'"),
        ("fa3", "flash_attn_interface", "flash-attn-3 is installed but cannot .*attention_kernel='cudnn'"),
    ],
)
def test_a_broken_package_says_what_to_do(
    stand_ins: None, monkeypatch: pytest.MonkeyPatch, kernel: str, module: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # its import then fails
    tensors, options, _ = problem("causal", kernel)
    with pytest.raises(ImportError, match=message):
        attention_forward(*tensors, options)
