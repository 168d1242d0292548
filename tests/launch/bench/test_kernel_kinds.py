"""What kernels are for, by their names: ours all of them, others' as profilers have shown them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import longseq
from longseq.launch.bench.kernel_kinds import ATTENTION, OURS, kind_of, short_name

SEEN = (
    "nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_TNN",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_kernel0_0",
    "_rms_norm_kernel",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*> >",
    "something_of_another_library",
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    "Memcpy HtoD (Pinned -> Device)",
    "Memcpy DtoH (Device -> Pinned)",
)


def test_every_kernel_of_ours_has_a_kind() -> None:
    root = Path(longseq.__file__).parent
    kernels = set()
    for folder in ("apollo", "cce", "distributed", "mst"):
        for path in (root / folder).rglob("*.py"):
            kernels |= set(re.findall(r"@triton\.jit[^\n]*\ndef (\w+_kernel)\(", path.read_text()))
    assert kernels == set(OURS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (SEEN[0], "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>(Params)", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(Params)", "products"),
        ("_columns_product_kernel", "products of the loss"),
        (SEEN[1], "attention forward"),
        (
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t> >",
            *ATTENTION[:1],
        ),
        (
            "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<Mainloop> > >",
            *ATTENTION[:1],
        ),
        (
            "kernel_cutlass_kernel_flash_attncuteflash_fwdFlashAttentionForwardSm90_object_at_0",
            *ATTENTION[:1],
        ),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention forward"),
        (
            "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_kernel0_0",
            "attention backward",
        ),
        (
            "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnBwdSm90<Mainloop> > >",
            *ATTENTION[1:],
        ),
        (
            "kernel_cutlass_kernel_flash_attncuteflash_bwdFlashAttentionBackwardSm90_object_at_0",
            *ATTENTION[1:],
        ),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*)", "attention backward"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80", "attention backward"),
        ("_gather_kernel", "loss"),
        ("void at::native::vectorized_gather_kernel<16, long>(char*, char*)", "embedding"),
        ("_add_sums_kernel", "norm"),
        ("_rotate_kernel", "rotary"),
        ("_gated_activation_backward_kernel", "activation"),
        ("_vector_statistics_kernel", "optimizer"),
        (
            "void at::native::multi_tensor_apply_kernel<at::native::LpNormFunctor<float, 2> >()",
            "gradient norm",
        ),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4> >()", "optimizer"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float, NormTwoOps<float> > >()", "gradient norm"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float, MeanOps<float> > >()", "reductions"),
        (SEEN[5], "NCCL"),
        (SEEN[6], "from host"),
        (SEEN[7], "to host"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("Memset (Device)", "copies and fills"),
        (SEEN[3], "copies and fills"),
        (
            "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda()>",
            "copies and fills",
        ),
        (
            "void at::native::unrolled_elementwise_kernel<at::native::CUDAFunctor_add<float> >()",
            "elementwise",
        ),
        ("void at::native::distribution_elementwise_grid_stride_kernel<float, 4>()", "random"),
        (SEEN[4], "other: something_of_another_library"),
    ],
)
def test_kinds_are_told_by_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_names_are_short_and_say_what_is_done() -> None:
    assert short_name(SEEN[3]) == "vectorized_elementwise_kernel FillFunctor"
    held = "BinaryFunctor<float, float, float, at::native::binary_internal::MulFunctor<float> >"
    name = (
        f"void at::native::elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<at::native::{held}"
    )
    assert short_name(name) == "elementwise_kernel MulFunctor"
    assert short_name("void cudnn::fusion::convert_dq_to_16bits<true>(void*)") == "convert_dq_to_16bits"
    assert short_name(SEEN[5]) == "ncclDevKernel_AllGather_RING_LL"
    assert short_name(SEEN[7]) == SEEN[7]
