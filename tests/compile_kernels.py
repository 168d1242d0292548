"""A program that compiles every kernel for Hopper, on any machine; tests/cce/test_kernels_compile.py runs it.

A launch compiles, and stops there. Each line that it prints is a JSON object: what was compiled and what it
takes, a kernel that nothing launched, or why this version of Triton cannot be asked.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from types import ModuleType, SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BF16 = torch.bfloat16


class OnGpu(Tensor):
    """A tensor that says it is on a GPU, for code that asks; what it makes says so too."""

    is_cuda = True


class Hopper:
    """What a compilation asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_launching(seen: dict[str, str]) -> None:
    """From now on a launch prints what it would have run; `seen` gathers the kernels' hashes and names."""
    driver.set_active(Hopper())
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen[kernel.hash] = self.__name__
            ptx = kernel.asm["ptx"]
            found = {"kernel": self.__name__, "shared": kernel.metadata.shared}
            found |= {"wgmma": "wgmma.mma_async" in ptx, "bulk_copies": "cp.async.bulk.tensor" in ptx}
            print(json.dumps(found), flush=True)

    JITFunction.run = compile_only
    properties = SimpleNamespace(multi_processor_count=132)
    torch.cuda.get_device_properties = lambda device=None: properties


@triton.jit
def _probe(out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, offsets)


def can_compile(seen: dict[str, str]) -> bool:
    """Whether this Triton compiles a kernel of three lines this way; says so if not."""
    try:
        compile_instead_of_launching(seen)
        _probe[(1,)](torch.empty(128, dtype=torch.int32), BLOCK=128)
    except Exception as error:
        print(json.dumps({"unsupported": f"Triton {triton.__version__}: {error!r}"}))
        return False
    return True


def on_gpu(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype).as_subclass(OnGpu)


def launch_everything() -> None:
    """Each kernel as its callers launch it: with few options, and with all."""
    from longseq.cce import fused
    from longseq.cce.head import Head, Needs, Statistics, Tokens
    from longseq.cce.kernels import logits, softmax_gradient, strips, weights

    num_tokens = 300
    labels, ones = on_gpu(num_tokens, dtype=torch.int64), on_gpu(num_tokens, dtype=torch.float32)
    few = Tokens(on_gpu(num_tokens, 128), labels), Head(on_gpu(768, 128)), Needs(True, True), 0.0
    every = (
        Tokens(on_gpu(num_tokens, 136), labels, on_gpu(num_tokens, 16)),
        Head(on_gpu(777, 136), on_gpu(777), on_gpu(777, 16), 30.0, 1.5),
        Needs(True, True, True, True, True),
        2**-12,
    )
    for tokens, head, needs, eps in (few, every):
        # In two chunks: the first writes, the second adds.
        fused.exact_loss(
            tokens,
            head,
            ones,
            z_loss=0.0,
            needs=needs,
            chunks=fused.Chunks(256),
            filter_eps=eps,
            report_dropped=eps > 0,
        )
        kept = fused.exact_loss(
            tokens, head, ones, z_loss=0.0, needs=needs, chunks=fused.Chunks(384, keep=True)
        ).kept
        fused.head_gradients(kept, head.weight.shape[0], ones[0], needs._replace(hidden=False, inner=False))
        found = fused.statistics(tokens, head, need_mean=eps > 0)
        upstream = Statistics(ones, ones, found.mean)
        fused.statistics_backward(tokens, head, ones, upstream, needs, None)
        one_tile = logits.RowTiles(on_gpu(1, dtype=torch.int32), None, 1)
        running = logits.log_sum_exp_strips(tokens, head, one_tile, need_mean=True, extras=True)
        strips.combine_strips(running, head.weight.shape[0], labels, None)
        options = {"label_smoothing": eps, "z_loss": 0.1, "need_gradient": eps > 0}
        all_logits = on_gpu(num_tokens, head.weight.shape[0])
        softmax_gradient.softmax_loss_(all_logits, labels, ones, head, **options)
    softmax_gradient.softmax_statistics(all_logits, labels, head, need_mean=True)
    softmax_gradient.softmax_gradient_(all_logits, labels, ones, upstream, head)
    gradient = on_gpu(777, 136, dtype=torch.float32)
    for rows in (None, on_gpu(777, dtype=torch.int64)):
        weights.scale_rows(gradient, ones[0], every[1].weight, rows=rows)


def launch_layers() -> None:
    """The kernels of decoder layers: rows of heads and of hidden states, with every option and with none."""
    from longseq.mst.kernels import (
        gated_activation,
        gated_activation_backward_,
        rms_norm,
        rms_norm_backward,
        rotate_,
    )

    for width in (128, 4096, 16384):
        for dtype in (BF16, torch.float32):
            x, weight = on_gpu(300, 2, width, dtype=dtype), on_gpu(width, dtype=dtype)
            sums = on_gpu(width, dtype=torch.float32)
            rms_norm(x, None, 1e-6)
            rms_norm(x, weight, 1e-6, weight_offset=1.0, out=x)
            rms_norm_backward(x, None, x, 1e-6)
            rms_norm_backward(x, weight, x, 1e-6, residual_grad=x, weight_grad=sums, out=x)
    # Rows that no load is as wide as.
    odd = on_gpu(300, 777)[:, :771]
    rms_norm_backward(odd, odd[0], odd, 1e-6, weight_grad=on_gpu(771, dtype=torch.float32), out=odd)
    for turned in (128, 20):
        angles = on_gpu(1, 300, turned, dtype=torch.float32)
        for inverse in (False, True):
            rotate_(on_gpu(1, 300, 5, 128), angles, angles, inverse=inverse)
    for activation in ("silu", "gelu_tanh", "gelu"):
        for gate, up in (on_gpu(300, 2 * 14336).chunk(2, 1), (odd, odd)):
            gated_activation(gate, up, activation)
            gated_activation_backward_(gate, up, up, activation)
            gated_activation_backward_(gate, up, up, activation, product=up)


def kernels_of(package: ModuleType) -> set[str]:
    modules = [
        importlib.import_module(f"{package.__name__}.{m.name}")
        for m in pkgutil.iter_modules(package.__path__)
    ]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }


def main() -> None:
    seen: dict[str, str] = {}
    if not can_compile(seen):
        return
    from longseq.cce import kernels
    from longseq.mst import kernels as layer_kernels

    with torch.no_grad():
        launch_everything()
        launch_layers()
    for name in sorted((kernels_of(kernels) | kernels_of(layer_kernels)) - set(seen.values())):
        print(json.dumps({"never_launched": name}))
    print(json.dumps({"done": True}))


if __name__ == "__main__":
    main()
