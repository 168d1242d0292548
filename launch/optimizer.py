"""The optimizer of a config, over a model's trainable weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from ..distributed.zero_init import whole_shape
from .config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW; weight decay on matrices alone, as norms and biases have no scale to be kept small."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    matrices = [param for param in trainable if len(whole_shape(param)) >= 2]
    vectors = [param for param in trainable if len(whole_shape(param)) < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if params
    ]
    on_gpu = bool(trainable) and trainable[0].is_cuda
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=on_gpu or None)
