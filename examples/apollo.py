"""APOLLO in your own loop: weights in bf16, two moments of a projection, and what the states take."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longseq.apollo import Apollo, parameter_groups

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
)
# from_pretrained models work the same
model = LlamaForCausalLM(config).bfloat16()

groups = parameter_groups(model, embeddings="low_rank")  # norms get AdamW, all matrices are projected
optimizer = Apollo(groups, lr=0.01, rank=16)  # APOLLO-Mini: scale_type="tensor" instead of a rank
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=30)

ids = torch.randint(0, 16, (4, 128))
for step in range(30):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()  # no wait for the device; weights are rounded stochastically
    optimizer.zero_grad()
    schedule.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")

report = optimizer.memory_report()
num_weights = sum(param.numel() for param in model.parameters())
print(report)
print(f"{report.state_bytes / num_weights:.2f} bytes a weight, where AdamW in float32 keeps 8")
