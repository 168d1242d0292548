"""Ulysses in your own loop, two processes on one sequence: torchrun --nproc-per-node 2 ulysses.py"""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from longseq.distributed import ProcessGroups, apply_ulysses, global_token_loss, shard_batch
from longseq.distributed.loss import count_tokens
from longseq.mst import apply_mini_sequence

dist.init_process_group("gloo")
groups = ProcessGroups.create(ulysses_degree=dist.get_world_size())
torch.manual_seed(0)  # the same weights and the same sequence on every rank
config = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
)
model = LlamaForCausalLM(config)
apply_ulysses(model, groups)
apply_mini_sequence(model, tile_tokens=256)

ids = torch.randint(0, 256, (1, 1023))  # any length: it is padded to what the ranks can share
batch = shard_batch({"input_ids": ids, "labels": ids}, groups)
num_tokens = count_tokens([batch["shift_labels"]], groups, torch.device("cpu"))
nll_sum = model(**batch, num_items_in_batch=1).loss
global_token_loss(nll_sum, num_tokens).backward()  # then sum the gradients over the ranks, and step

total = groups.all_sum(nll_sum.detach().clone()) / num_tokens
if groups.is_main:
    print(f"loss over {int(num_tokens)} tokens on {groups.world_size} processes: {total.item():.3f}")
dist.destroy_process_group()
