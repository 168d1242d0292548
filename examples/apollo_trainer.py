"""APOLLO-Mini under Hugging Face's Trainer, on one process or many, with DDP, FSDP2 or DeepSpeed."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from longseq.apollo import trainer_optimizer

config = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
)
model = LlamaForCausalLM(config)  # from_pretrained models work the same
texts = [torch.randint(0, 16, (256,)) for _ in range(32)]
data = [{"input_ids": ids, "labels": ids} for ids in texts]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=1,
        logging_steps=2,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    optimizer = trainer_optimizer(arguments, scale_type="tensor", embeddings="low_rank")
    # With DeepSpeed's ZeRO also callbacks=[longseq.distributed.apollo_trainer.LayOutApollo()].
    trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=optimizer)
    trainer.train()
    print(trainer.optimizer.optimizer.memory_report())
