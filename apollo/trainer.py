"""`Apollo` for Hugging Face's Trainer, which makes its optimizer itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .optimizer import Apollo
from .selection import Rule, parameter_groups

if TYPE_CHECKING:
    from transformers import TrainingArguments


class MakeApollo:
    """Makes the optimizer once the Trainer has its model: what the Trainer calls a factory."""

    def __call__(
        self,
        model: nn.Module,
        *,
        embeddings: Rule,
        weight_decay: float,
        overrides: Mapping[str, Rule] | None,
        **options: Any,
    ) -> Apollo:
        """`Apollo` over a model's trainable weights."""
        groups = parameter_groups(
            model, embeddings=embeddings, weight_decay=weight_decay, overrides=overrides
        )
        return Apollo(groups, **options)


def trainer_optimizer(
    args: TrainingArguments,
    *,
    embeddings: Rule = "adamw",
    overrides: Mapping[str, Rule] | None = None,
    **options: Any,
) -> tuple[type[MakeApollo], dict[str, Any]]:
    """What makes a Trainer train with `Apollo`, on one process, under DDP, FSDP2 and DeepSpeed's ZeRO.

        Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer(args, scale_type="tensor"), ...)

    `Trainer(optimizers=(Apollo(parameter_groups(model)), None))` is the same on one process and under DDP.
    With FSDP the Trainer refuses it, and with DeepSpeed it drops it without a word and takes AdamW. DeepSpeed
    needs `callbacks=[LayOutApollo()]` too (`longseq.distributed.apollo_trainer`).

    Learning rate, weight decay (on matrices alone), betas and seed are the arguments'. `adam_epsilon` is not
    taken: its default is AdamW's.

    Args:
        args: The Trainer's.
        embeddings, overrides: As `parameter_groups` takes them.
        **options: `Apollo`'s; they come before what the arguments say.
    """
    taken = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.weight_decay,
        "seed": args.seed,
    }
    return MakeApollo, {"embeddings": embeddings, "overrides": overrides, **taken, **options}
