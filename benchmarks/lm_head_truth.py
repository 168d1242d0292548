"""What is right, in float64, and what a filter by tiles of 128x128 would make of it.

"Apple's rule" is that of "Cut Your Losses in Large-Vocabulary Language Models" (arXiv:2411.09009) and of
ml-cross-entropy: with the words sorted by their mean logit, a tile of 128 tokens and 128 words is left out
of the gradient where no |softmax - one-hot| in it reaches eps. Here the rule alone is applied, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lm_head_data import Problem, chunks
from torch import Tensor
from torch.nn import functional as F

EPS = 2.0**-12  # what ml-cross-entropy's filter_eps="auto" is for bfloat16
TILE = 128
FACT_TOKENS = 8192
SPOT_TOKENS = 128
SPOT_WORDS = 64


@dataclass
class Gradients:
    """Loss and gradients of its mean; all float64."""

    loss: Tensor
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def worst(*errors: float) -> float:
    """The largest, or NaN if one is NaN, which Python's `max` may drop."""
    return float(torch.tensor(errors).max())


def gradients(problem: Problem, filtered: bool = False) -> Gradients:
    """The truth for a problem, or with `filtered` what Apple's rule keeps of it (the loss is the same)."""
    hidden, weight = problem.hidden.detach().double(), problem.weight.detach().double()
    order = _by_mean_logit(problem) if filtered else None
    loss = hidden.new_zeros(())
    found = Gradients(loss, torch.empty_like(hidden), torch.zeros_like(weight))
    for tokens in chunks(len(hidden)):
        logits, labels = hidden[tokens] @ weight.T, problem.labels[tokens]
        loss += F.cross_entropy(logits, labels, reduction="sum")
        pull = _pull(logits.softmax(1), labels)
        del logits
        if order is not None:
            living = _living_tiles(pull[:, order])
            pull = pull[:, order].mul_(_spread(living, pull.shape))[:, order.argsort()]
        found.hidden[tokens] = pull @ weight
        found.weight.addmm_(pull.T, hidden[tokens])
    for total in (found.loss, found.hidden, found.weight):
        total /= len(hidden)
    return found


def facts(problem: Problem) -> dict[str, float]:
    """What a filter finds in the data: shares of tiles and of probability, on the first 8192 tokens."""
    num_tokens = min(FACT_TOKENS, len(problem.labels))
    columns = problem.weight.detach().float().T
    order = _by_mean_logit(problem)
    sums = dict.fromkeys(("over", "tail", "id", "sorted", "dropped id", "dropped sorted", "tiles"), 0.0)
    for tokens in chunks(num_tokens):
        logits = problem.hidden.detach()[tokens].float() @ columns
        chances = logits.sub_(problem.lse[tokens, None]).exp_()
        over = chances >= EPS
        sums["over"] += int(over.sum())
        sums["tail"] += float(chances.masked_fill(over, 0).sum())
        del over
        for name, words in (("id", slice(None)), ("sorted", order)):
            living = _living_tiles(_pull(chances.clone(), problem.labels[tokens])[:, words])
            kept = (chances[:, words] * _spread(living, chances.shape)).sum()
            sums[name] += int(living.sum())
            sums[f"dropped {name}"] += float(chances.sum() - kept)
        sums["tiles"] += living.numel()
    return {
        "NLL": problem.mean_nll,
        "words >= eps a token": sums["over"] / num_tokens,
        "probability under eps": sums["tail"] / num_tokens,
        "f, id order": sums["id"] / sums["tiles"],
        "f, sorted": sums["sorted"] / sums["tiles"],
        "dropped, id order": sums["dropped id"] / num_tokens,
        "dropped, sorted": sums["dropped sorted"] / num_tokens,
    }


class SpotCheck:
    """Loss, some rows of dE and some of dW in float64, cheap enough for a problem of any length.

    What goes wrong only at full size (an offset over 2^31, a last chunk) shows here. The tokens are the
    last, the words the labels of the last tokens and others spread over the vocabulary to its end.
    """

    def __init__(self, problem: Problem) -> None:
        hidden, labels = problem.hidden.detach(), problem.labels
        num_tokens, vocab_size = len(labels), len(problem.weight)
        self.loss = problem.mean_nll
        self.tokens = slice(max(0, num_tokens - SPOT_TOKENS), num_tokens)
        spread = torch.linspace(0, vocab_size - 1, SPOT_WORDS, device=labels.device).long()
        self.words = torch.cat((labels[-SPOT_WORDS:], spread)).unique()
        weight = problem.weight.detach().double()
        pull = _pull((hidden[self.tokens].double() @ weight.T).softmax(1), labels[self.tokens])
        self.hidden = pull @ weight / num_tokens
        chosen = weight[self.words].clone()
        del weight, pull
        self.weight = torch.zeros_like(chosen)
        for tokens in chunks(num_tokens):
            rows = hidden[tokens].double()
            pull = (rows @ chosen.T - problem.lse[tokens, None]).exp_()
            pull -= (labels[tokens, None] == self.words).double()
            self.weight.addmm_(pull.T, rows)
        self.weight /= num_tokens

    def errors(self, loss: Tensor, hidden: Tensor | None, weight: Tensor | None) -> tuple[float, float]:
        """The loss's relative error, and the largest of all; gradients count where there are any."""
        found = [abs(float(loss) - self.loss) / abs(self.loss)]
        if hidden is not None and weight is not None:
            found.append(relative_error(hidden[self.tokens], self.hidden))
            found.append(relative_error(weight[self.words], self.weight))
        return found[0], worst(*found)


def _pull(chances: Tensor, labels: Tensor) -> Tensor:
    """softmax - one-hot, in the memory of the softmax."""
    return chances.scatter_add_(1, labels[:, None], -torch.ones_like(labels[:, None], dtype=chances.dtype))


def _by_mean_logit(problem: Problem) -> Tensor:
    """Words by rising mean logit; the mean over tokens is the mean hidden state's logit."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    return (weight.float() @ hidden.float().mean(0)).argsort()


def _living_tiles(pull: Tensor) -> Tensor:
    """Which tiles of `(N, V)` keep an element of at least eps, `(tiles of tokens, tiles of words)`."""
    num_tokens, vocab_size = pull.shape
    padded = F.pad(pull.abs(), (0, -vocab_size % TILE, 0, -num_tokens % TILE))
    return padded.view(-(-num_tokens // TILE), TILE, -1, TILE).amax((1, 3)) >= EPS


def _spread(living: Tensor, shape: torch.Size) -> Tensor:
    """The map of tiles as a mask of elements."""
    return living.repeat_interleave(TILE, 0)[: shape[0]].repeat_interleave(TILE, 1)[:, : shape[1]]
