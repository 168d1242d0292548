"""Mini-sequences in your own loop: any token-wise module, tile by tile, rebuilt in backward."""

import torch
from torch import nn

from longseq.mst import mini_sequence

mlp = nn.Sequential(nn.Linear(64, 1024), nn.SiLU(), nn.Linear(1024, 64))
x = torch.randn(1, 8192, 64, requires_grad=True)

out = mini_sequence(mlp, x, mlp.parameters(), tile_tokens=1024)  # keeps x alone for backward
out.square().mean().backward()

plain = torch.autograd.grad(mlp(x).square().mean(), x)[0]
print(f"largest difference from the untiled gradient: {(x.grad - plain).abs().max().item():.1e}")
