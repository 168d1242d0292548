"""FLOPs against torch's own counter and against arithmetic by hand; the peaks that MFU divides by."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from longseq.launch.flops import ModelShape, linear_weights, model_flops, peak_tflops

SHAPE = ModelShape(
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=101,
)


def hf_config(**changes):
    fields = {
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 101,
    }
    return SimpleNamespace(**(fields | changes))


@pytest.mark.parametrize("model_type", ["llama", "phi"])
def test_linear_flops_are_what_torch_counts(model_type):
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = vars(hf_config(model_type=model_type)) | {"pad_token_id": None, "attn_implementation": "eager"}
    if model_type == "phi":  # it has neither grouped heads of its own width nor a gate
        del fields["head_dim"]
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_hf_config(config)
    batch, length = 2, 7
    ids = torch.arange(batch * length).reshape(batch, length)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()

    # Eager attention does the whole square, 4 forward and 8 backward; ours counts 7, see model_flops.
    square = batch * shape.num_layers * length**2 * shape.num_heads * shape.head_dim
    linear = counter.get_total_flops() - 12 * square
    assert model_flops(shape, [length] * batch) == linear + 7 * square


def test_attention_counts_each_document_by_its_own_square():
    def attention(lengths):
        return model_flops(SHAPE, lengths) - 6 * linear_weights(SHAPE) * sum(lengths)

    assert attention([100]) == 3.5 * 2 * 100**2 * 6 * 8 * 3
    assert attention([30, 70]) == 3.5 * 2 * (30**2 + 70**2) * 6 * 8 * 3
    # Ranks count their own documents and add up.
    assert model_flops(SHAPE, [30]) + model_flops(SHAPE, [70]) == model_flops(SHAPE, [30, 70])


def test_int32_lengths_do_not_overflow():
    lengths = [131_072, 65_536]
    assert model_flops(SHAPE, np.array(lengths, dtype=np.int32)) == model_flops(SHAPE, lengths)


def test_a_window_counts_the_pairs_inside_it():
    windowed = dataclasses.replace(SHAPE, sliding_window=10, num_sliding_layers=2)
    per_pair = 3.5 * 4 * 6 * 8
    missing = model_flops(SHAPE, [100]) - model_flops(windowed, [100])
    # Of 100 x 100 / 2 pairs a windowed layer keeps a band of 10, less the triangle at its start.
    assert missing == 2 * per_pair * (100 * 100 / 2 - (100 * 10 - 10 * 10 / 2))
    assert model_flops(windowed, [9]) == model_flops(SHAPE, [9])


def test_frozen_weights_need_no_weight_gradient():
    saved = model_flops(SHAPE, [50]) - model_flops(SHAPE, [50], frozen_weights=True)
    assert saved == 2 * linear_weights(SHAPE) * 50


def test_llama_3_8b_at_64k():
    shape = ModelShape(4096, 14336, 32, 32, 8, 128, 128256)
    # 8.03e9 parameters less the embedding (0.525e9) and the norms.
    assert linear_weights(shape) == 7_504_658_432
    # At 65,536 tokens attention is a good half of it: what 6 N D forgets.
    assert model_flops(shape, [65536]) / (6 * linear_weights(shape) * 65536) == pytest.approx(2.336, abs=1e-3)


def test_shape_of_a_config():
    assert ModelShape.from_hf_config(hf_config()) == SHAPE
    wrapped = SimpleNamespace(get_text_config=hf_config)
    assert ModelShape.from_hf_config(wrapped) == SHAPE
    derived = ModelShape.from_hf_config(hf_config(head_dim=None, num_key_value_heads=None))
    assert (derived.head_dim, derived.num_kv_heads) == (4, 6)


@pytest.mark.parametrize(
    ("changes", "window", "layers"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, 16, 3),
        ({"model_type": "mistral", "sliding_window": None}, None, 0),
        (
            {
                "model_type": "gemma2",
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            16,
            2,
        ),
        # Qwen2 keeps a window in its file and uses it in no layer.
        ({"model_type": "qwen2", "sliding_window": 16, "layer_types": ["full_attention"] * 3}, None, 0),
    ],
)
def test_windows_of_a_config(changes, window, layers):
    shape = ModelShape.from_hf_config(hf_config(**changes))
    assert (shape.sliding_window, shape.num_sliding_layers) == (window, layers)


def test_a_model_that_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match=r"model_type='mixtral'.*known are.*llama"):
        ModelShape.from_hf_config(hf_config(model_type="mixtral"))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A40", 149.7),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peak_is_the_dense_one_of_that_device(name, tflops):
    assert peak_tflops(name, "bf16") == tflops


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "Tesla V100-SXM2-16GB",
        "cpu",
    ],
)
def test_no_peak_is_guessed(name):
    assert peak_tflops(name, "bf16") is None


def test_peak_by_dtype():
    import torch

    assert peak_tflops("NVIDIA H200", torch.bfloat16) == 989.4
    assert peak_tflops("NVIDIA H200", "float32") is None
