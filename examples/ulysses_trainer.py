"""Ulysses under Hugging Face's Trainer: torchrun --nproc-per-node 2 ulysses_trainer.py"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from longseq.distributed import ProcessGroups, apply_ulysses
from longseq.distributed.trainer import SequenceParallelMixin
from longseq.mst import apply_mini_sequence


class UlyssesTrainer(SequenceParallelMixin, Trainer):
    """Samples, losses and counts of one process, whatever the number of ranks of a sequence."""


torch.manual_seed(0)  # the same samples on every rank
texts = [torch.randint(0, 256, (length,)) for length in (1023, 300, 512, 777)]
data = [{"input_ids": ids, "labels": ids} for ids in texts]
sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 256}

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=1,  # sequences, which ranks then share
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    groups = ProcessGroups.create(ulysses_degree=2)  # after the arguments, which start the processes' group
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    apply_ulysses(model, groups)
    apply_mini_sequence(model, tile_tokens=256)
    trainer = UlyssesTrainer(model, arguments, groups=groups, train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    print(trainer.evaluate())
