"""What a ping between processes says about the network below it."""

from __future__ import annotations

from .findings import Finding, error, ok
from .ping import STAGES, Ping

NCCL_ADVICE = (
    "Set NCCL_DEBUG=INFO and run it again to see where it stops. NCCL_P2P_DISABLE=1 helps where GPUs cannot "
    "read each other's memory, NCCL_SOCKET_IFNAME=eth0 (the name of your network card) where NCCL takes a "
    "wrong one, NCCL_IB_DISABLE=1 where InfiniBand is broken; in a container --ipc=host or a larger /dev/shm."
)
GLOO_ADVICE = (
    "Set GLOO_SOCKET_IFNAME to the name of a network card that works (lo for this machine alone); is the "
    "host's own name in /etc/hosts?"
)


def check_ping(facts: Ping) -> list[Finding]:
    """One line: they talk, they hang, they die, or what arrives is wrong."""
    name = {"nccl": "NCCL", "gloo": "gloo"}[facts.backend]
    on = "GPUs" if facts.backend == "nccl" else "processes of the CPU"
    who = f"{name} between {facts.num_processes} {on}"
    advice = NCCL_ADVICE if facts.backend == "nccl" else GLOO_ADVICE
    stage = next((one for one in STAGES if one not in _done(facts.reached)), "leaving")
    stage = {"started": "the start", "joined": "joining"}.get(stage, stage)
    if facts.hung:
        return [error(f"{who} hangs: {stage} was not over after {facts.limit_s:.0f} s", advice)]
    if "WRONG NUMBERS" in facts.failure:
        broken = "A link or a GPU is broken: do not train on it. "
        return [error(f"{who}: {facts.failure.partition(': ')[2]}", broken + advice)]
    if facts.failure:
        return [error(f"{who} fails in {stage}: {facts.failure}", advice)]
    return [ok(f"{who}: all-reduce and all-to-all are right")]


def _done(reached: str) -> tuple[str, ...]:
    return STAGES[: STAGES.index(reached) + 1] if reached else ()
