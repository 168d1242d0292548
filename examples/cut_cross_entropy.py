"""Cut cross-entropy in your own loop: the loss of a head without its logits."""

import torch

from longseq.cce import linear_cross_entropy

hidden = torch.randn(2, 1000, 64, requires_grad=True)  # what your decoder returns: (batch, tokens, width)
head = torch.nn.Linear(64, 32000, bias=False)
labels = torch.randint(0, 32000, (2, 1000))
labels[:, :100] = -100  # a prompt: these tokens cost nothing

loss = linear_cross_entropy(hidden, head.weight, labels, shift=True, memory_mib=64)
loss.backward()
print(f"loss {loss.item():.3f}, gradient of the head {tuple(head.weight.grad.shape)}")
