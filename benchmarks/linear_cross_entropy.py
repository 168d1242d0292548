"""Linear + cross-entropy, forward and backward: time in units of the bare logits matmul, memory, and error.

python benchmarks/linear_cross_entropy.py --out benchmarks/results
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import report
import torch
from torch import Tensor
from torch.nn import functional as F

from longseq.cce import linear_cross_entropy

HEADS = {"Gemma-2-2B": (256000, 2304), "Llama-3-8B": (128256, 4096)}
NUM_TOKENS = 8192
ERROR_TOKENS = 1024
REPEATS = 5

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def exact(memory_mib: int) -> Loss:
    return lambda hidden, weight, labels: linear_cross_entropy(
        hidden, weight, labels, method="exact", memory_mib=memory_mib
    )


def methods() -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "eager, float32 logits": eager,
        "torch.compile": torch.compile(eager),
        "longseq exact, 512 MiB": exact(512),
        "longseq exact, 2048 MiB (default)": exact(2048),
        "longseq exact, 6144 MiB": exact(6144),
    }
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
    except ImportError:
        return found
    found["Liger fused linear CE"] = lambda hidden, weight, labels: liger(hidden, weight, labels)
    return found


def make(num_tokens: int, vocab_size: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A peaked softmax: labels are drawn from the logits' own distribution at a loss near 3."""
    torch.manual_seed(0)
    weight = torch.randn(vocab_size, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    labels = torch.randint(0, vocab_size, (num_tokens,), device="cuda")
    hidden = 12.0 * weight[labels] + torch.randn(num_tokens, width, device="cuda", dtype=torch.bfloat16)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def seconds(function: Callable[[], Any]) -> float:
    function()
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def step(loss: Loss, tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    tensors[0].grad = tensors[1].grad = None
    value = loss(*tensors)
    value.backward()
    return value.detach()


def peak_mib(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def errors(loss: Loss, vocab_size: int, width: int) -> dict[str, float]:
    """Relative error of loss and gradients against float64, on fewer tokens."""
    tensors = make(ERROR_TOKENS, vocab_size, width)
    truth = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in tensors[:2])
    true_loss = F.cross_entropy(truth[0] @ truth[1].T, tensors[2])
    true_loss.backward()
    value = step(loss, tensors)
    pairs = (
        ("loss", value, true_loss.detach()),
        ("dE", tensors[0].grad, truth[0].grad),
        ("dW", tensors[1].grad, truth[1].grad),
    )
    return {
        f"error {name}": float((ours.double() - right).norm() / right.norm()) for name, ours, right in pairs
    }


def measure(loss: Loss, tensors: tuple[Tensor, Tensor, Tensor], matmul_s: float) -> dict[str, float]:
    tensors[0].grad = tensors[1].grad = None
    peak = peak_mib(lambda: step(loss, tensors))
    took = seconds(lambda: step(loss, tensors))
    return {"ms": took * 1e3, "G": took / matmul_s, "peak MiB": peak}


def bare_matmul_s(hidden: Tensor, weight: Tensor) -> float:
    with torch.no_grad():
        return seconds(lambda: hidden @ weight.T)


def main() -> None:
    args = report.arguments(__doc__.splitlines()[0]).parse_args()
    rows = []
    for head, (vocab_size, width) in HEADS.items():
        tensors = make(NUM_TOKENS, vocab_size, width)
        matmul_s = bare_matmul_s(*tensors[:2])
        rows.append({"head": head, "method": "bare logits matmul (G)", "ms": matmul_s * 1e3, "G": 1.0})
        for name, loss in methods().items():
            found = errors(loss, vocab_size, width)
            if not found["error loss"] < 1e-2:
                raise SystemExit(f"{name} disagrees with float64: {found}; nothing is reported.")
            rows.append({"head": head, "method": name, **measure(loss, tensors, matmul_s), **found})
    title = f"Linear cross-entropy, forward + backward, {NUM_TOKENS} tokens, bf16"
    report.write(
        "linear_cross_entropy", title, rows, args.out, num_tokens=NUM_TOKENS, error_tokens=ERROR_TOKENS
    )


if __name__ == "__main__":
    main()
