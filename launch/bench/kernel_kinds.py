"""What a GPU's kernels are for, as far as their names say it."""

from __future__ import annotations

import functools
import re

ATTENTION = ("attention forward", "attention backward")
PRODUCTS = ("products", "products of the loss")
COMPUTE = (
    *("loss", "norm", "rotary", "activation", "optimizer", "gradient norm", "embedding", "random"),
    *("copies and fills", "reductions", "elementwise"),
)
BESIDE = ("NCCL", "from host", "to host")
"""What can run beside computing, and is seen to."""

OURS = {
    "_logits_kernel": "products of the loss",
    "_rows_product_kernel": "products of the loss",
    "_columns_product_kernel": "products of the loss",
    "_statistics_kernel": "loss",
    "_loss_kernel": "loss",
    "_gradient_kernel": "loss",
    "_check_sums_kernel": "loss",
    "_combine_kernel": "loss",
    "_living_kernel": "loss",
    "_list_kernel": "loss",
    "_gather_kernel": "loss",
    "_finalize_kernel": "loss",
    "_scatter_kernel": "loss",
    "_column_sums_kernel": "loss",
    "_scale_rows_kernel": "loss",
    "_label_gradient_kernel": "loss",
    "_apart_kernel": "loss",
    "_add_labels_kernel": "loss",
    "_rms_norm_kernel": "norm",
    "_rms_norm_backward_kernel": "norm",
    "_add_sums_kernel": "norm",
    "_rotate_kernel": "rotary",
    "_gated_activation_kernel": "activation",
    "_gated_activation_backward_kernel": "activation",
    "_channel_statistics_kernel": "optimizer",
    "_vector_statistics_kernel": "optimizer",
    "_vector_moments_kernel": "optimizer",
    "_signs_kernel": "optimizer",
    "_limit_kernel": "optimizer",
    "_update_kernel": "optimizer",
    "_adamw_kernel": "optimizer",
    "_scale_kernel": "optimizer",
    "_dequantize_kernel": "optimizer",
    "_quantize_kernel": "optimizer",
}
"""Triton names a kernel as its function."""

# The first that fits. Attention comes before products: flash attention's names have "cutlass" in them.
_SIGNS = (
    ("NCCL", r"^nccl"),
    ("from host", r"^Memcpy HtoD"),
    ("to host", r"^Memcpy DtoH"),
    ("copies and fills", r"^Mem(cpy|set)"),
    (
        "attention backward",
        r"(flash|fmha|sdpa|attention).*(bwd|bprop|backward)|fmha_cutlassB"
        r"|cudnn::fusion::(compute_dot_do_o|convert_dq|fmha_reduce_head)",
    ),
    ("attention forward", r"(flash|fmha|sdpa|attention).*(fwd|fprop|forward|prepare)|fmha_cutlassF"),
    ("products", r"nvjet|gemm|gemv|cutlass|splitK|cublas"),
    ("loss", r"SoftMax|softmax_warp|nll_loss|cross_entropy"),
    ("gradient norm", r"NormTwoOps|NormOps|LpNorm"),
    ("norm", r"(layer|rms)_?norm"),
    ("rotary", r"rotary|(\b|_)rope"),
    ("activation", r"silu|gelu|swiglu"),
    ("optimizer", r"adam|multi_tensor|FusedOptimizer"),
    (
        "embedding",
        r"embedding|compute_grad_weight|sum_and_scatter|krn_partial|gather_kernel|indexSelect"
        r"|radix_?sort|unique_by_key|DeviceReduceByKey",
    ),
    ("random", r"curand|philox|distribution_|bernoulli|dropout"),
    ("copies and fills", r"copy_kernel|_copy|CatArray|FillFunctor|copy_device"),
    ("reductions", r"reduce_kernel|cub::.*(Reduce|Scan)"),
    ("elementwise", r"at::native|elementwise"),
)
_COMPILED = tuple((kind, re.compile(sign, re.IGNORECASE)) for kind, sign in _SIGNS)
_OPERATION = re.compile(
    r"\b(\w+_kernel(?:_cuda|_impl)?|\w+_kernel_impl|CUDAFunctor\w*|\w+Functor|launch_\w+|\w+Ops)\b"
)
_HOLDER = re.compile(r"elementwise_kernel|reduce_kernel|gpu_kernel_impl|(Binary|AUnary|BUnary)Functor")
_SHORT = 60


@functools.cache
def kind_of(name: str) -> str:
    """What a kernel or copy of this name is for; "other: ..." where nothing says it."""
    if name in OURS:
        return OURS[name]
    for kind, sign in _COMPILED:
        if sign.search(name):
            return kind
    return f"other: {short_name(name)}"


@functools.cache
def short_name(name: str) -> str:
    """A kernel's name without its templates; PyTorch's own by what they do to an element."""
    if not name.startswith(("void ", "at::")) and "<" not in name:
        return name.split("(")[0].strip()[:_SHORT] if not name.startswith("Mem") else name[:_SHORT]
    bare = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    function = re.split(r"[<(]", bare, maxsplit=1)[0].split("::")[-1]
    if "elementwise" in function or function == "reduce_kernel":
        found = [word for word in _OPERATION.findall(bare) if not _HOLDER.search(word)]
        function = f"{function} {found[0]}" if found else function
    return function[:_SHORT]


def order(kind: str) -> tuple[int, str]:
    """For sorting: a moment in which several kinds run belongs to the first of them."""
    listed = (*PRODUCTS, *ATTENTION, *COMPUTE)
    if kind in listed:
        return listed.index(kind), ""
    if kind in BESIDE:
        return len(listed) + 1 + BESIDE.index(kind), ""
    return len(listed), kind


def computes(kind: str) -> bool:
    """Whether a gap ends where such a kernel starts."""
    return kind not in BESIDE
