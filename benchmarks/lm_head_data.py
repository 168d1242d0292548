"""The data of `lm_head.py`: heads, hidden states and labels with the softmax that a language model has.

Three kinds, all in bfloat16, the labels drawn so that the loss is what the softmax says it is:

flat: hidden states and weights are normal, the logits have a standard deviation of 0.5, and labels are
    uniform. No word of a large vocabulary comes near a filter's threshold.
zipf, zipf-sharp: logits are `-exponent * log(rank + 2.7)` plus what the context says. The first part is one
    direction that all hidden states and all words share. The second is the product of a word's own normal
    vector (its length is near 1) with the context's: a vector shared by the 512 tokens of a document, of
    `document` nats, plus each token's own, of `context` nats times a factor uniform in [0.5, 1.5]. So
    tokens of one tile of 128 are of one document and lift the same words, as in text, and some are surer
    than others. Ids are ranks with noise: the order of `log(rank) + jitter * normal`, as those of BPE are.
    Labels are drawn from the softmax itself. The exponent is over that of plain word counts, since
    contexts lift rare words: averaged over tokens the probabilities fall with about rank^-1.4.

The scales of zipf were chosen for 256,000 words: a mean NLL near 3, and 45 % of the 128x128 tiles, words
sorted by mean logit, with an element over 2^-12. zipf-sharp has an NLL near 1.9 and 20 % there. A smaller
vocabulary has fewer rare words and so more such tiles. Documents differ: the mean NLL of one is off by some
tenths. Chunks of tokens and of words have generators of their own: the first tokens of a long problem
are a short problem.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SEED = 20240906
DOCUMENT_TOKENS = 512  # also the chunk in which logits are formed
WORD_CHUNK = 16384
FLAT_LOGIT_STD = 0.5
SHARED_LENGTH = 8.0  # of the part that all hidden states share; any will do, the words' part divides by it


@dataclass(frozen=True)
class Shape:
    """A head: its vocabulary, its width, and the tokens that it is measured with."""

    name: str
    vocab_size: int
    width: int
    num_tokens: int = 8192


@dataclass(frozen=True)
class Peaks:
    """What makes a softmax peaked; see the module's text."""

    exponent: float
    document: float
    context: float
    jitter: float = 1.0


SHAPES = {
    "gemma": Shape("Gemma-2-2B", 256000, 2304),
    "llama": Shape("Llama-3-8B", 128256, 4096),
    "qwen": Shape("Qwen-2.5-7B", 152064, 3584),
    "odd": Shape("odd sizes", 50257, 1000, 8191),
    "tiny": Shape("tiny", 1003, 40, 300),
}
KINDS: dict[str, Peaks | None] = {
    "flat": None,
    "zipf": Peaks(exponent=1.52, document=2.0, context=2.8),
    "zipf-sharp": Peaks(exponent=2.0, document=2.5, context=3.5),
}


@dataclass
class Problem:
    """One call's inputs, and each token's log-sum-exp in float32."""

    hidden: Tensor  # (N, D) bfloat16, wants a gradient
    weight: Tensor  # (V, D) bfloat16, wants a gradient
    labels: Tensor  # (N,) int64
    lse: Tensor  # (N,) float32
    mean_nll: float


def draw_weight(shape: Shape, kind: str, device: str) -> Tensor:
    """The head's weight, `(V, D)` in bfloat16, wanting a gradient.

    The same seed gives the same weight on every device of a kind, not on a CPU and a GPU.
    """
    peaks = KINDS[kind]
    weight = torch.empty(shape.vocab_size, shape.width, dtype=torch.bfloat16, device=device)
    offsets = None if peaks is None else _log_frequencies(shape, peaks, device)
    shared = _shared_direction(shape, device)
    for index, start in enumerate(range(0, shape.vocab_size, WORD_CHUNK)):
        rows = weight[start : start + WORD_CHUNK]
        values = torch.randn(rows.shape, generator=_generator(device, 1, index), device=device)
        values /= shape.width**0.5
        if offsets is not None:
            values += offsets[start : start + WORD_CHUNK, None] / SHARED_LENGTH * shared
        rows.copy_(values)
    return weight.requires_grad_()


def draw_problem(shape: Shape, kind: str, weight: Tensor, num_tokens: int) -> Problem:
    """Hidden states and labels for a weight of `draw_weight`."""
    device = weight.device
    hidden = torch.empty(num_tokens, shape.width, dtype=torch.bfloat16, device=device)
    labels = torch.empty(num_tokens, dtype=torch.int64, device=device)
    lse = torch.empty(num_tokens, device=device)
    columns = weight.detach().float().T
    label_logits = torch.empty(num_tokens, device=device)
    for index, tokens in enumerate(chunks(num_tokens)):
        generator = _generator(str(device), 2, index)
        hidden[tokens] = _draw_hidden(shape, KINDS[kind], generator, str(device))[: hidden[tokens].shape[0]]
        logits = hidden[tokens].float() @ columns
        lse[tokens] = logits.logsumexp(1)
        labels[tokens] = _draw_labels(logits, lse[tokens], KINDS[kind] is None, generator)
        label_logits[tokens] = logits.gather(1, labels[tokens, None])[:, 0]
        del logits  # before the next chunk's are made
    mean_nll = (lse - label_logits).double().mean().item()
    return Problem(hidden.requires_grad_(), weight, labels, lse, mean_nll)


def chunks(num_tokens: int) -> Iterator[slice]:
    """Slices of the tokens, a document each."""
    for start in range(0, num_tokens, DOCUMENT_TOKENS):
        yield slice(start, min(start + DOCUMENT_TOKENS, num_tokens))


def _log_frequencies(shape: Shape, peaks: Peaks, device: str) -> Tensor:
    """Each id's part of the logit that no context changes, centred so that bfloat16 has bits for it."""
    generator = _generator(device, 3, 0)
    ranks = torch.arange(1, shape.vocab_size + 1, device=device).float()
    noise = torch.randn(shape.vocab_size, generator=generator, device=device)
    of_ids = ranks[(ranks.log() + peaks.jitter * noise).argsort()]
    values = -peaks.exponent * (of_ids + 2.7).log()
    return values - values.mean()


def _shared_direction(shape: Shape, device: str) -> Tensor:
    values = torch.randn(shape.width, generator=_generator(device, 4, 0), device=device)
    return values / values.norm()


def _draw_hidden(shape: Shape, peaks: Peaks | None, generator: torch.Generator, device: str) -> Tensor:
    """The hidden states of one document, `(DOCUMENT_TOKENS, D)`: always whole, so that prefixes agree."""
    own = torch.randn(DOCUMENT_TOKENS, shape.width, generator=generator, device=device)
    if peaks is None:
        return FLAT_LOGIT_STD * own
    document = torch.randn(shape.width, generator=generator, device=device)
    sureness = 0.5 + torch.rand(DOCUMENT_TOKENS, 1, generator=generator, device=device)
    shared = _shared_direction(shape, device)
    context = peaks.document * document + peaks.context * sureness * own
    # What a context has along the shared direction would scale the exponent, by a third either way.
    context -= (context @ shared)[:, None] * shared
    return SHARED_LENGTH * shared + context


def _draw_labels(logits: Tensor, lse: Tensor, uniform: bool, generator: torch.Generator) -> Tensor:
    num_tokens, vocab_size = logits.shape
    if uniform:
        # As many as a whole document has, for the same reason as in `_draw_hidden`.
        draw = torch.randint(vocab_size, (DOCUMENT_TOKENS,), generator=generator, device=logits.device)
        return draw[:num_tokens]
    # The largest of p / exponential is a draw from p (the "exponential race"). Rows are raced in blocks
    # since the noise takes as much memory as the logits do.
    drawn = []
    for rows in torch.arange(num_tokens, device=logits.device).split(128):
        noise = torch.empty(128, vocab_size, device=logits.device).exponential_(generator=generator)
        race = (logits[rows] - lse[rows, None]).exp_()
        drawn.append(race.div_(noise[: len(rows)]).argmax(1))
    return torch.cat(drawn)


def _generator(device: str, purpose: int, index: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(SEED + purpose * 1_000_003 + index)
