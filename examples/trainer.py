"""Mini-sequences and cut cross-entropy under Hugging Face's Trainer."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from longseq.mst import apply_mini_sequence

config = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
)
model = LlamaForCausalLM(config)
handle = apply_mini_sequence(model, tile_tokens=256)  # from_pretrained models work the same

texts = [torch.randint(0, 256, (1024,)) for _ in range(8)]
data = [{"input_ids": ids, "labels": ids} for ids in texts]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=1, report_to=[], use_cpu=True
    )
    Trainer(model, arguments, train_dataset=data).train()

handle.undo()  # the model is as it was: logits, generation and all
print(model(input_ids=texts[0][None, :8]).logits.shape)
