"""The optimizer in backward: weights are updated as their gradients arrive, and no gradient is kept."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longseq.apollo import step_in_backward
from longseq.mst import apply_mini_sequence

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
)
model = LlamaForCausalLM(config)  # from_pretrained models work the same
apply_mini_sequence(model, tile_tokens=256)  # hands each weight's gradient out once
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # or any other
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
handle = step_in_backward(optimizer, model, clip_norm=1.0)

ids = torch.randint(0, 16, (1, 1024))
for step in range(20):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()  # updates the weights; every .grad is None afterwards
    norm = handle.finish_step()  # in place of optimizer.step()
    schedule.step()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {loss.item():.3f}, gradient norm {norm.item():.3f}")

handle.remove()  # backward leaves gradients for optimizer.step() again
