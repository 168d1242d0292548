"""DeepSpeed-Ulysses: between two all-to-alls, each rank holds some heads of the whole sequence.

Everything outside attention is token-wise and works on this rank's shard of S = L / P tokens. Queries, keys
and values go out in one exchange and the result comes back in one: two collectives a layer forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter

import torch.distributed as dist
from torch import Tensor

from .attention import attention_backward, attention_forward, local_attention
from .attention_kernels import AttentionOptions, Documents
from .exchange import Arriving, Exchange
from .groups import ProcessGroups
from .head_plan import HeadPlan, plan_heads
from .per_head import PerHead

HeadsOut = tuple[Tensor, Tensor]
"""Attention's output and its log-sum-exp."""
HeadsGrad = tuple[Tensor, Tensor, Tensor]
"""Gradients of queries, keys and values."""
Sent = tuple[Exchange, Arriving]
"""A group on its way to the ranks of its heads, and what will bring the result back."""
Departure = tuple[Exchange, Arriving, Tensor | None]
"""The same with the log-sum-exp that backward needs."""
Attended = tuple[tuple[Tensor, ...], Tensor | None]
"""What attention makes of a group, backward or forward, and in forward the log-sum-exp."""
Leaving = tuple[Arriving, Tensor | None]
"""Tensors on their way to where their tokens are, and the log-sum-exp that stays."""


class UlyssesAttention:
    """Causal attention of a sequence that is spread over a process group.

    A call is differentiable. `forward_groups` and `backward_groups` are the same without autograd, for layers
    that decide themselves what waits between the two: for one group of heads after the other, the exchange of
    each beside the attention of another, but where memory is wanted more (see `_exchanged`).
    """

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups

    @property
    def sp_size(self) -> int:
        """Ranks that share a sequence."""
        return self._groups.sp_size

    @property
    def group(self) -> dist.ProcessGroup | None:
        """These ranks; None where a rank is alone."""
        return self._groups.sp

    def plan(self, num_heads: int, num_kv_heads: int) -> HeadPlan:
        """Which heads each rank attends with.

        Raises:
            ValueError: There are more ranks than query heads.
        """
        return plan_heads(num_heads, num_kv_heads, self._groups.sp_size)

    def _exchange(self, plan: HeadPlan) -> Exchange:
        return Exchange(plan, self._groups.sp_rank, self._groups.sp)

    def __call__(
        self,
        query: Tensor,  # (B, N, S, H)
        key: Tensor,  # (B, K, S, H)
        value: Tensor,  # (B, K, S, H)
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        document_offsets: Tensor | Documents | None = None,
        sinks: Tensor | None = None,  # (N,)
        alibi_slopes: Tensor | None = None,  # (N,)
    ) -> Tensor:
        """Attention output of this rank's tokens, `(B, N, S, H)`.

        Args:
            query: This rank's queries.
            key: Its keys; N is a multiple of K.
            value: Its values.
            scale: Factor of the scores.
            window: As for `local_attention`, here and below.
            softcap: Likewise.
            document_offsets: Of the whole sequence.
            sinks: A logit of each head of the model that takes part in the softmax and has no value.
            alibi_slopes: What a score of each head of the model loses a token of distance.
        """
        rules = {"scale": scale, "window": window, "softcap": softcap, "document_offsets": document_offsets}
        if self._groups.sp_size == 1:
            return local_attention(query, key, value, **rules, sinks=sinks, alibi_slopes=alibi_slopes)
        plan = self.plan(query.shape[1], key.shape[1])
        exchange = self._exchange(plan)
        mine = PerHead(sinks, alibi_slopes).select(plan.queries.heads(self._groups.sp_rank))
        # Between the exchanges lies the whole sequence: it stays for backward, which need not send it.
        out = local_attention(
            *exchange.to_heads("qkk", query, key, value),
            **rules,
            sinks=mine.sinks,
            alibi_slopes=mine.alibi_slopes,
        )
        return exchange.to_tokens("q", out)[0]

    def forward_groups(
        self,
        groups: Iterable[tuple[Tensor, Tensor, Tensor]],
        options: AttentionOptions,
        document_offsets: Tensor | Documents | None = None,
    ) -> Iterator[HeadsOut]:
        """`attention_forward` of groups of heads; two collectives each, nothing is kept.

        Args:
            groups: Queries `(B, N, S, H)`, keys and values `(B, K, S, H)` of each group. They are asked for
                one group ahead: a group is sent, and the one before returns, while another attends. Groups
                whose key/value heads go to more than one rank are taken one after the other instead, so that
                nothing of another group is alive.
            options: Scale, window, softcap and kernel.
            document_offsets: Of the whole sequence.

        Yields:
            This rank's output of a group, `(B, N, S, H)`, and the log-sum-exp of this rank's heads over all
            tokens, in a layout of the kernel's own, for `backward_groups` on the same rank.
        """

        def alone(tensors: tuple[Tensor, ...]) -> HeadsOut:
            return attention_forward(*tensors, options, document_offsets)

        def attend(tensors: tuple[Tensor, ...], _: Tensor | None) -> Attended:
            out, lse = alone(tensors)
            return (out,), lse

        def depart(tensors: tuple[Tensor, ...]) -> Departure:
            return *self._send("qkk", *tensors), None

        # `map` holds on to no group while the next one is made.
        if self._groups.sp_size == 1:
            yield from map(alone, groups)
            return
        yield from map(_out_and_lse, _exchanged(map(depart, groups), attend, "q"))

    def send_ahead(self, groups: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]]) -> list[Sent] | None:
        """Send what `backward_groups` needs beside gradients, while those are still being computed.

        Args:
            groups: Queries, keys, values and output of each group.

        Returns:
            What `backward_groups` takes as `ahead`; None where there is nobody to send to.
        """
        if self._groups.sp_size == 1:
            return None
        return [self._send("qkkq", *tensors) for tensors in groups]

    def backward_groups(
        self,
        groups: Iterable[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]],
        options: AttentionOptions,
        document_offsets: Tensor | Documents | None = None,
        ahead: Sequence[Sent] | None = None,
    ) -> Iterator[HeadsGrad]:
        """Gradients of groups of heads; two collectives each, overlapped likewise.

        Args:
            groups: Of each group the gradient of its output, its queries, keys and values, and the output and
                log-sum-exp that `forward_groups` gave. With `ahead`, gradient and log-sum-exp alone.
            options: The same options.
            document_offsets: The same documents.
            ahead: From `send_ahead`.

        Yields:
            Gradients of this rank's queries, keys and values of a group.
        """

        def alone(tensors: tuple[Tensor, ...]) -> HeadsGrad:
            return attention_backward(*tensors, options, document_offsets)

        def attend(tensors: tuple[Tensor, ...], lse: Tensor | None) -> Attended:
            if early:
                tensors = (*early.popleft()[1].wait(), *tensors)
            query, key, value, out, grad_out = tensors
            return alone((grad_out, query, key, value, out, lse)), None

        def depart(group: tuple[Tensor, ...]) -> Departure:
            grad_out, *tensors, lse = group
            if not early:
                return *self._send("qkkqq", *tensors, grad_out), lse
            exchange = early[0][0]  # of one shape for all groups
            return exchange, exchange.start_to_heads("q", grad_out), lse

        if self._groups.sp_size == 1:
            yield from map(alone, groups)
            return
        early = deque(ahead or ())
        yield from map(itemgetter(0), _exchanged(map(depart, groups), attend, "qkk"))

    def _send(self, kinds: str, *tensors: Tensor) -> Sent:
        exchange = self._exchange(self.plan(tensors[0].shape[1], tensors[1].shape[1]))
        return exchange, exchange.start_to_heads(kinds, *tensors)


def _exchanged(
    departures: Iterator[Departure],
    attend: Callable[[tuple[Tensor, ...], Tensor | None], Attended],
    kinds: str,
) -> Iterator[Attended]:
    """Send each group, attend with it and send the result back.

    Each group is sent before the one ahead of it attends, and that one returns while this one attends. But
    where a key/value head goes to several ranks, one group is through before the next one is made: what is
    packed and received is then a multiple of the groups' own tensors, of which no second is held.
    """
    here = next(departures, None)
    overlaps = here is not None and not here[0].shares_keys
    leaving: deque[Leaving] = deque()
    while here is not None:
        exchange, arriving, lse = here
        # What it takes to make the next group runs beside this exchange.
        here = next(departures, None) if overlaps else None
        found, lse = attend(arriving.wait(), lse)  # what has arrived is gone before the result is packed
        leaving.append((exchange.start_to_tokens(kinds, *found), lse))
        del found
        if len(leaving) > 1 or not overlaps:
            yield _arrived(*leaving.popleft())
        if not overlaps:
            here = next(departures, None)
    if leaving:
        yield _arrived(*leaving.popleft())


def _arrived(arriving: Arriving, lse: Tensor | None) -> Attended:
    return arriving.wait(), lse


def _out_and_lse(attended: Attended) -> HeadsOut:
    (out,), lse = attended
    return out, lse
