"""Cut cross-entropy alone under Hugging Face's Trainer, one process: the logits are never made."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from longseq.cce import linear_cross_entropy


class CutCrossEntropyTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        base = self.accelerator.unwrap_model(model)
        hidden = base.get_decoder()(**inputs).last_hidden_state
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = linear_cross_entropy(hidden, base.lm_head.weight, labels, shift=True, reduction=reduction)
        loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return (loss, {"loss": loss}) if return_outputs else loss


config = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
)
model = LlamaForCausalLM(config)  # from_pretrained models work the same
texts = [torch.randint(0, 256, (1024,)) for _ in range(8)]
data = [{"input_ids": ids, "labels": ids} for ids in texts]

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, max_steps=3, report_to=[], use_cpu=True, logging_steps=1)
    CutCrossEntropyTrainer(model, arguments, train_dataset=data).train()
