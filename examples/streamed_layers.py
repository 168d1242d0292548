"""Streamed decoder layers in your own loop: each keeps its input alone, and the gradients stay the same."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longseq.mst import apply_mini_sequence

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, vocab_size=256
)
model = LlamaForCausalLM(config)  # from_pretrained models work the same
texts = [torch.randint(0, 256, (1, length)) for length in (512, 300, 777)]
num_labels = sum(ids.numel() - 1 for ids in texts)  # of the whole step


def accumulate() -> tuple[float, torch.Tensor]:
    """Loss and gradients of one step over all texts, one text at a time."""
    model.zero_grad()
    total = 0.0
    for ids in texts:
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=num_labels).loss
        loss.backward()
        total += loss.item()
    return total, torch.cat([param.grad.flatten() for param in model.parameters()])


plain_loss, plain = accumulate()
handle = apply_mini_sequence(model, checkpoints="host", head_groups=2, save_attention=True)
loss, grads = accumulate()
print(f"loss {loss:.6f}, of the plain model {plain_loss:.6f}")
print(f"the gradients differ by {(grads - plain).norm() / plain.norm():.0e} of their norm")

handle.undo()  # the model is as it was
print(model.generate(texts[0][:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
