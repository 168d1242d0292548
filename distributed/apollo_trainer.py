"""APOLLO under Hugging Face's Trainer with DeepSpeed, whose engine is made inside of it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..apollo import Apollo
from .apollo_state import lay_out_apollo


class LayOutApollo(TrainerCallback):
    """Calls `lay_out_apollo` once the Trainer has made its engine; without DeepSpeed's ZeRO it does nothing.

        Trainer(
            model,
            args,  # TrainingArguments(deepspeed=...)
            optimizer_cls_and_kwargs=trainer_optimizer(args),
            callbacks=[LayOutApollo()],
        )

    The Trainer's checkpoints are DeepSpeed's own then, and go on with as many processes and the same stage.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any, **others: Any
    ) -> None:
        """Of the Trainer.

        Raises:
            ValueError: The Trainer has another optimizer.
        """
        layers = [optimizer]  # accelerate's wrapper, DeepSpeed's, and the one that was asked for
        while not isinstance(layers[-1], Apollo):
            if not hasattr(layers[-1], "optimizer"):
                raise ValueError(
                    f"the Trainer's optimizer is {type(layers[-1]).__name__}, not Apollo: with DeepSpeed it "
                    "drops what optimizers= was given. Pass optimizer_cls_and_kwargs="
                    "longseq.apollo.trainer_optimizer(args)."
                )
            layers.append(layers[-1].optimizer)
        zero = layers[-2] if len(layers) > 1 else None
        if hasattr(zero, "dp_process_group"):
            lay_out_apollo(zero, model)
