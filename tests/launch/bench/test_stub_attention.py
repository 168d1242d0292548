"""What stands in the place of attention's kernel: zeros of the right shapes, on the instance alone."""

from __future__ import annotations

import pytest
import torch
from gloo import run_cases
from torch import Tensor
from training_samples import tiny_llama

from longseq.distributed import ProcessGroups
from longseq.distributed.apply_ulysses import apply_ulysses
from longseq.distributed.attention_kernels import AttentionOptions
from longseq.distributed.ulysses import UlyssesAttention
from longseq.launch.bench.stub_attention import StubAttention, stub_attention, workspace
from longseq.mst import apply_mini_sequence

OPTIONS = AttentionOptions(scale=0.5)


def heads(num_tokens: int, num_heads: int) -> Tensor:
    return torch.randn(1, num_tokens, num_heads, 8, generator=torch.Generator().manual_seed(7)).transpose(
        1, 2
    )


def shared_by_two() -> dict[str, list]:
    """A group of 4 query and 2 key/value heads through the stub and through real attention."""
    groups = ProcessGroups.create(2)
    stub, real = StubAttention(groups=groups), UlyssesAttention(groups)
    query, key = heads(10, 4), heads(10, 2)
    [(out, lse)] = stub.forward_groups([(query, key, key)], OPTIONS)
    sent = stub.send_ahead([(query, key, key, out)])
    ahead = list(stub.backward_groups([(query, lse)], OPTIONS, None, sent))
    grads = list(stub.backward_groups([(query, query, key, key, out, lse)], OPTIONS))
    [(attended, _)] = real.forward_groups([(query, key, key)], OPTIONS)
    return {
        "out": list(out.shape),
        "lse": list(lse.shape),
        "grads": [list(grad.shape) for group in (*ahead, *grads) for grad in group],
        "zeros": [bool(t.any()) for t in (out, lse, *ahead[0], *grads[0])],
        "calls": [stub.num_calls],
        "real": [bool(attended.any())],
    }


@pytest.mark.slow  # two processes start
def test_ranks_that_share_a_sequence_exchange_and_have_the_kernel_alone_left_out() -> None:
    for found in run_cases(2, {"stub": (shared_by_two, {})})["stub"]:
        assert found["out"] == [1, 4, 10, 8]
        # Of this rank's heads over the whole sequence, as the kernel gives it.
        assert found["lse"] == [1, 2, 20]
        assert found["grads"] == [[1, 4, 10, 8], [1, 2, 10, 8], [1, 2, 10, 8]] * 2
        assert not any(found["zeros"])
        assert found["calls"] == [3]
        assert found["real"] == [True]


@pytest.mark.parametrize(
    ("kernel", "packed", "shape"),
    [
        ("cudnn", False, (1, 4, 10, 1)),
        ("fa4", False, (1, 4, 10)),
        ("fa4", True, (4, 10)),
        ("flash", True, (4, 10)),
        ("cpu", True, (1, 4, 10)),
    ],
)
def test_the_log_sum_exp_has_the_kernels_layout(kernel: str, packed: bool, shape: tuple[int, ...]) -> None:
    documents = torch.tensor([0, 4, 10]) if packed else None
    [(_, lse)] = StubAttention(kernel).forward_groups([(heads(10, 4), *[heads(10, 2)] * 2)], None, documents)
    assert (tuple(lse.shape), lse.dtype) == (shape, torch.float32)


@pytest.mark.parametrize(("kernel", "measured_mib"), [("cudnn", 5648), ("fa4", 4640)])
def test_the_stub_takes_what_was_measured_of_the_kernel(kernel: str, measured_mib: int) -> None:
    """benchmarks/results/decoder_probe.md has the two numbers."""
    query = torch.empty(1, 131072, 32, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    key = torch.empty(1, 131072, 8, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    stub = StubAttention(kernel)
    [(out, lse)] = stub.forward_groups([(query, key, key)], None)
    [grads] = stub.backward_groups([(out, query, key, key, out, lse)], None)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]
    assert [grad.stride() for grad in (out, *grads)] == [t.stride() for t in (query, query, key, key)]
    held = sum(count * dtype.itemsize for count, dtype in workspace(kernel, query, key, out))
    assert (held + sum(grad.nbytes for grad in grads)) / 2**20 == measured_mib


def test_flash_attention_2_takes_a_groups_output_in_one_piece() -> None:
    query, key = heads(10, 4), heads(10, 2)
    whole = workspace("flash", query, key, query)
    columns = workspace("flash", query, key, heads(10, 8)[:, :4])
    assert columns == [*whole, (query.numel(), query.dtype)]


def test_attention_of_layers_that_are_not_streamed_is_left_out() -> None:
    model = tiny_llama()
    apply_ulysses(model, ProcessGroups())
    real = model.model.layers[0].self_attn.longseq_attention
    [stub] = stub_attention(model)
    assert {id(layer.self_attn.longseq_attention) for layer in model.model.layers} == {id(stub)}
    assert isinstance(stub, UlyssesAttention)
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert stub.num_calls == 2 * len(model.model.layers)
    for name, param in model.named_parameters():
        assert bool(param.grad.any()) != ("self_attn" in name or "input_layernorm" in name), name
    assert real(heads(10, 4), heads(10, 4), heads(10, 4), scale=1.0).any()


@pytest.mark.parametrize("head_groups", [1, 2])
def test_a_streamed_layer_is_one_whose_attention_gives_zeros(head_groups: int) -> None:
    """Which is what a real one does that has no output projection."""
    ids = torch.arange(75)[None] % 64
    plain, stubbed = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    apply_ulysses(stubbed, ProcessGroups())
    apply_mini_sequence(stubbed, checkpoints="host", head_groups=head_groups)
    [stub] = stub_attention(stubbed)
    losses = [model(input_ids=ids, labels=ids).loss for model in (plain, stubbed)]
    for loss in losses:
        loss.backward()
    assert stub.num_calls > 0
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    for (name, param), other in zip(plain.named_parameters(), stubbed.parameters(), strict=True):
        if "self_attn" in name:
            assert not other.grad.any(), name
        else:
            torch.testing.assert_close(other.grad, param.grad, rtol=1e-4, atol=1e-6, msg=name)
