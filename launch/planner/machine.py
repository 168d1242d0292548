"""The machine that a plan is for: one kind of GPU, how many, and the memory of their hosts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU, as far as a plan needs it. Rates are what large calls attain, not a datasheet's peaks.

    Attributes:
        name: As torch says it, or the catalogue's.
        memory_bytes: Total, as the driver says it.
        context_bytes: Of it, what CUDA and its libraries take outside of torch's allocator.
        matmul_tflops: Of products in bf16 with float32 sums.
        attention_forward_tflops: Of causal attention, its half of the square counted alone.
        attention_backward_tflops: The same, backward.
        memory_gb_s: Its own memory, reading and writing together.
        host_gb_s: Between pinned host memory and the GPU, one direction.
        link_gb_s: To the other GPUs of its node, what one sends at once.
        network_gb_s: To GPUs of other nodes.
    """

    name: str
    memory_bytes: int
    context_bytes: int
    matmul_tflops: float
    attention_forward_tflops: float
    attention_backward_tflops: float
    memory_gb_s: float
    host_gb_s: float
    link_gb_s: float
    network_gb_s: float


@dataclass(frozen=True)
class Machine:
    """What a run is given.

    Attributes:
        gpu: Of which all are.
        num_gpus: Over all nodes, one process each.
        gpus_per_node: As many share a host's memory.
        host_bytes: Of each node, for all its processes together.
    """

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    host_bytes: int
