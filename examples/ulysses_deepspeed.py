"""Ulysses and ZeRO in your own DeepSpeed loop: torchrun --nproc-per-node 2 ulysses_deepspeed.py [STAGE]"""

import sys

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longseq.distributed import ProcessGroups, apply_ulysses, global_token_loss, shard_batch
from longseq.distributed.loss import count_tokens
from longseq.distributed.zero import init_deepspeed_communication
from longseq.mst import apply_mini_sequence

torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
init_deepspeed_communication()  # deepspeed.init_distributed(), which compiles nothing on a CPU
groups = ProcessGroups.create(ulysses_degree=2)
torch.manual_seed(0)  # the same weights on every rank
sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 256}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
apply_ulysses(model, groups)
apply_mini_sequence(model, tile_tokens=256)  # before the engine is made
config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
config["zero_optimization"] = {"stage": int(sys.argv[1]) if len(sys.argv) > 1 else 3}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)

draw = torch.Generator().manual_seed(groups.dp_rank)  # ranks that share a sequence read the same one
for step in range(3):
    ids = [torch.randint(0, 256, (1, length), generator=draw).to(engine.device) for length in (1023, 300)]
    shards = [shard_batch({"input_ids": text, "labels": text}, groups) for text in ids]
    num_tokens = count_tokens((shard["shift_labels"] for shard in shards), groups, engine.device)
    mean = torch.zeros((), device=engine.device)
    for shard in shards:
        nll_sum = engine(**shard, num_items_in_batch=1).loss
        # Told nothing of sequence parallelism, DeepSpeed averages over all ranks, in every ZeRO stage.
        loss = global_token_loss(nll_sum, num_tokens, reducer_divisor=groups.world_size)
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()
        mean += nll_sum.detach() / num_tokens
    print(f"step {step}: rank {groups.rank} says {groups.all_sum(mean):.4f} over {num_tokens:.0f} tokens")
