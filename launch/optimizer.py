"""The optimizer of a config, over a model's trainable weights."""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.optim import Optimizer

from ..apollo import Apollo, parameter_groups
from ..distributed.zero_init import whole_shape
from .config import OptimizerConfig

logger = logging.getLogger(__name__)


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, seed: int = 0) -> Optimizer:
    """Weight decay is on matrices alone, as norms and biases have no scale to be kept small."""
    return _adamw(model, config) if config.name == "adamw" else _apollo(model, config, seed)


def _apollo(model: nn.Module, config: OptimizerConfig, seed: int) -> Apollo:
    own = config.apollo
    optimizer = Apollo(
        parameter_groups(model, embeddings=own.embeddings, weight_decay=config.weight_decay),
        config.lr,
        rank=own.rank,
        scale_type="channel" if config.name == "apollo" else "tensor",
        update_gap=own.update_gap,
        alpha=own.alpha,
        betas=config.betas,
        eps=config.eps or 1e-6,
        norm_growth_limit=own.norm_growth_limit,
        seed=seed,
    )
    _warn_of_narrow_matrices(optimizer)
    return optimizer


def _warn_of_narrow_matrices(optimizer: Apollo) -> None:
    """A rank as large as the matrices would make a run of apollo one of AdamW, unseen."""
    rules = [
        optimizer.rule_of(group, whole_shape(param))
        for group in optimizer.param_groups
        if group["rule"] == "low_rank"
        for param in group["params"]
    ]
    num_narrow = len(rules) - rules.count("low_rank")
    if num_narrow:
        logger.warning(
            "optimizer.apollo.rank=%d is not below the shorter side of %d of the %d matrices, which AdamW "
            "updates instead; set a lower one, such as a quarter of the hidden size.",
            optimizer.param_groups[0]["rank"],
            num_narrow,
            len(rules),
        )


def _adamw(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    trainable = [param for param in model.parameters() if param.requires_grad]
    matrices = [param for param in trainable if len(whole_shape(param)) >= 2]
    vectors = [param for param in trainable if len(whole_shape(param)) < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if params
    ]
    on_gpu = bool(trainable) and trainable[0].is_cuda
    eps = config.eps or 1e-8
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=eps, fused=on_gpu or None)
