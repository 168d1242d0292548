"""Block sizes of the kernels for whole matrices, and why.

Chosen among a dozen or two each on an H200, on the four shapes of Llama-3-8B's decoder matrices in bf16
(`benchmarks/results/optimizer_tuning.md`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """How much a program does.

    The rest than the product is bound by memory: the update moves 4.1 TB/s, the statistics of rank 1 3.7.

    Attributes:
        channels: Of a tile of the product. Two programs of 64 channels in 4 warps share a processor, and one
            moves its moments while the other multiplies: 13 to 23 % faster than one of 128 in 8.
        ranks: Most of a tile; a larger rank takes several programs, each of which reads the gradient.
        inner_bytes: Of a channel's part that a program reads at a time; 128 is a line, and a swizzle's width.
        num_warps: Of the product's programs.
        num_stages: Steps of the product's loop that overlap; with 4, the programs do not fit side by side.
        vector_elements: Of a tile at rank 1, in `vector_warps`: two 16-byte loads of bf16 a thread.
        vector_channels: Of it; a row's part is then 512 elements where channels are rows.
        vector_columns: Channels of it where these are columns: 2 KiB of bf16 a row, 29 to 37 % faster than
            512 bytes.
        vector_split: Rows that a program sums where channels are columns; 8 bytes a column are written and
            read then, 2 % of what it sums. No function of the GPU, or sums would differ between two of them.
        sum_elements: Channels that are looked at together, in `sum_warps`, when a matrix's sums are made.
        update_elements: Of a tile of the update, in `update_warps`: two 16-byte loads of bf16 a thread and
            tensor.
        update_columns: Most columns of it.
        sign_columns: Of a tile of signs.
    """

    channels: int = 64
    ranks: int = 256
    inner_bytes: int = 128
    num_warps: int = 4
    num_stages: int = 3
    vector_elements: int = 4096
    vector_warps: int = 8
    vector_channels: int = 8
    vector_columns: int = 1024
    vector_split: int = 512
    sum_elements: int = 4096
    sum_warps: int = 16
    update_elements: int = 4096
    update_warps: int = 8
    update_columns: int = 1024
    sign_columns: int = 256
