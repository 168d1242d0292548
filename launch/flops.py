"""How many operations a training step is worth, and how many the GPU could do at most. Pure Python.

Model FLOPs are those of the mathematics: what is recomputed to save memory is not counted, so a run that
recomputes less shows a higher rate, and two runs of one model compare.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Matrices of a decoder layer's MLP: gate, up and down, or up and down alone.
_GATED_MLP = frozenset(
    {
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "ministral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
_PLAIN_MLP = frozenset({"gpt_neox", "phi", "starcoder2"})

# Attention's products a pair of tokens: two forward (scores, values) and five backward, since the fused
# kernels rebuild the scores there; so backward is 2.5 x forward (FlashAttention-2, arXiv 2307.08691, 4.1).
_ATTENTION_FORWARD_AND_BACKWARD = 3.5

# Dense bf16 (= float16) tensor-core TFLOP/s with float32 accumulation. NVIDIA's datasheets quote twice this
# "with sparsity" from Ampere on; the source of each row is the datasheet of that name on nvidia.com.
# The first pattern found in the device's name counts, so the special ones stand first; a GeForce must end
# there, since its D, Ti and laptop namesakes are other chips.
_PEAK_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"GB[23]00", 2500.0),  # GB200 NVL72: 360 PFLOP/s sparse over 72 GPUs; GB300 NVL72: the same
    (r"B[23]00", 2250.0),  # HGX B200 and B300: 36 PFLOP/s sparse over 8 GPUs
    (r"H200 NVL", 835.5),  # H200 NVL: 1,671 sparse
    (r"G?H200", 989.4),  # H200 SXM and GH200: 1,979 sparse
    (r"H[18]00 PCIe", 756.0),  # H100 PCIe: 1,513 sparse
    (r"H100 NVL", 835.5),  # H100 NVL: 1,671 sparse
    (r"H[18]00", 989.4),  # H100 SXM: 1,979 sparse
    (r"H20", 148.0),  # H20: 148 dense
    (r"A[18]00", 312.0),  # A100, PCIe and SXM: 312 dense
    (r"L40S", 362.05),  # L40S: 362.05 dense
    (r"L40", 181.05),  # L40: 181.05 dense
    (r"L4", 121.0),  # L4: 242 sparse
    (r"A40", 149.7),  # A40: 149.7 dense
    (r"A10", 125.0),  # A10: 125 dense (A10G is another part and not listed)
    (r"RTX A6000", 154.8),  # RTX A6000: 309.7 sparse
    (r"RTX 5090$", 209.5),  # RTX Blackwell whitepaper: 209.5 dense
    (r"RTX 4090$", 165.2),  # Ada whitepaper: 165.2 dense
    (r"RTX 3090$", 71.0),  # GA102 whitepaper: 71 dense
)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Llama-like decoder that decide its FLOPs.

    Attributes:
        mlp_matrices: matrices of one MLP: 3 if gated (gate, up, down), else 2.
        sliding_window: how far back a token of a windowed layer sees, in tokens; None without such layers.
        num_sliding_layers: how many of `num_layers` attend within `sliding_window` only.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    mlp_matrices: int = 3
    sliding_window: int | None = None
    num_sliding_layers: int = 0

    @classmethod
    def from_hf_config(cls, config: Any) -> ModelShape:
        """Reads the sizes of a Hugging Face config (of its text part, if it has several).

        Raises:
            ValueError: for an architecture whose FLOPs this file cannot count (experts, unknown layers).
        """
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        model_type = config.model_type
        if model_type not in _GATED_MLP | _PLAIN_MLP:
            known = ", ".join(sorted(_GATED_MLP | _PLAIN_MLP))
            raise ValueError(
                f"model_type={model_type!r}: its FLOPs cannot be counted; known are {known}. "
                "Training goes on without TFLOP/s and MFU."
            )
        num_sliding = _num_sliding_layers(config)
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            mlp_matrices=3 if model_type in _GATED_MLP else 2,
            sliding_window=config.sliding_window if num_sliding else None,
            num_sliding_layers=num_sliding,
        )


def _num_sliding_layers(config: Any) -> int:
    """Layers with a window: those named so, or all when a window is set and no layer is named."""
    if not getattr(config, "sliding_window", None):
        return 0
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return config.num_hidden_layers
    return sum(kind == "sliding_attention" for kind in layer_types)


def linear_weights(shape: ModelShape) -> int:
    """Weights that multiply every token: the layers' matrices and the LM head, tied or not.

    The embedding is a look-up and norms and biases are elementwise: none of them is counted.
    """
    query = shape.num_heads * shape.head_dim
    key_value = shape.num_kv_heads * shape.head_dim
    attention = shape.hidden_size * (2 * query + 2 * key_value)
    mlp = shape.mlp_matrices * shape.hidden_size * shape.intermediate_size
    return shape.num_layers * (attention + mlp) + shape.vocab_size * shape.hidden_size


def model_flops(shape: ModelShape, document_lengths: Iterable[int], *, frozen_weights: bool = False) -> float:
    """FLOPs of training once on these documents, forward and backward, nothing recomputed.

    Linear layers take 6 a weight and token. Causal attention takes 3.5 x 2 x L^2 x N x H a layer and
    document: 2 x L^2 x N x H is the causal half of a forward's 4 x L^2 x N x H, and backward is 2.5 forwards.
    A windowed layer counts the pairs inside its window.
    The count is additive: that of a step is the sum over its ranks' documents.

    Args:
        shape: the model's sizes.
        document_lengths: tokens of each document (tokens never attend across documents). Padding is no
            document: it is not worth a FLOP.
        frozen_weights: the base weights get no gradient (LoRA): 4 a weight and token. The adapters' own
            FLOPs, well under a hundredth, are left out.

    Returns:
        FLOPs (not tera).
    """
    lengths = [int(length) for length in document_lengths]
    linear = (4 if frozen_weights else 6) * linear_weights(shape) * sum(lengths)
    full_layers = shape.num_layers - shape.num_sliding_layers
    pairs = full_layers * sum(_causal_pairs(length, None) for length in lengths)
    pairs += shape.num_sliding_layers * sum(_causal_pairs(length, shape.sliding_window) for length in lengths)
    forward = 4 * pairs * shape.num_heads * shape.head_dim
    return float(linear + _ATTENTION_FORWARD_AND_BACKWARD * forward)


def _causal_pairs(length: int, window: int | None) -> float:
    """Query-key pairs of one document; L^2 / 2 rather than L (L + 1) / 2, as papers count."""
    if window is None or length <= window:
        return length * length / 2
    return window * length - window * window / 2


def peak_tflops(device_name: str, dtype: object) -> float | None:
    """Dense datasheet peak of one GPU, in TFLOP/s.

    Args:
        device_name: as `torch.cuda.get_device_name()` says it.
        dtype: `"bf16"`, `"bfloat16"`, `"float16"` or the torch dtype.

    Returns:
        None for a device that is not listed, a slice of one (MIG), and for float32, whose peak depends on
        whether TF32 is allowed: no MFU is better than a wrong one.
    """
    if str(dtype).removeprefix("torch.") not in ("bf16", "bfloat16", "fp16", "float16"):
        return None
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, tflops in _PEAK_BF16_TFLOPS:
        if re.search(rf"\b{pattern}(?![0-9A-Za-z])", device_name):
            return tflops
    return None
