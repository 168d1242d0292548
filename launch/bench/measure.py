"""A run's own set-up and steps, and what they take: one process of a measurement."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ...distributed.groups import ProcessGroups
from ...distributed.loss import count_tokens, global_token_loss
from ...distributed.sequence import shard_batch
from ...mst import pinned_memory
from ..config import RunConfig
from ..config_file import check_world
from ..data.dataset import Batch, micro_batches
from ..evaluation import summed_nll
from ..planner.machine import outside_bytes
from ..planner.plan import Plan
from ..setup import RunParts, set_up
from ..sizes import gib
from .limits import GpuLimit, pinned_bytes
from .watch import PHASES, PhaseWatch

WARM_UP_TOKENS = 4096
"""Of each rank, in a step that is there for its kernels to be compiled."""
ON_HOST = "layer inputs and attention on the host"
"""What a plan calls the memory that layers keep in."""
Row = dict[str, Any]


class Measurement:
    """Steps of a config on this rank.

    Attributes:
        row: What was found so far, over all ranks: of seconds and bytes the most.
        watch: On a step's phases.
        parts: The run's, once it is set up.
        profile_lines: Of the step that was taken apart, as people read it.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroups,
        device: torch.device,
        document_tokens: int | None = None,
        gpu_limit: GpuLimit | None = None,
    ) -> None:
        """Does nothing yet.

        Args:
            config: Whose data are documents of `document_tokens`, or one a sequence.
            groups: This rank's process groups.
            device: Where it computes.
            document_tokens: Of each document.
            gpu_limit: That steps must stay within.
        """
        self.config, self.groups, self.device = config, groups, device
        self.document_tokens = document_tokens or config.sequence.length
        self.watch = PhaseWatch(device)
        self.row: Row = {}
        self.parts: RunParts | None = None
        self.profile_lines: list[str] = []
        self._gpu_limit = gpu_limit
        self._step_number = 0

    @property
    def plan(self) -> Plan | None:
        """By which the run is run."""
        return None if self.parts is None else self.parts.plan

    def set_up(self) -> None:
        """The run's own."""
        started = time.perf_counter()
        sharing = check_world(self.config, self.groups.world_size)
        self.parts = set_up(self.config, sharing, self.groups, self.device)
        said = self.parts.plan
        if said is not None:
            self.row["said"] = {
                "knobs": asdict(said.knobs),
                "seconds": said.seconds.seconds,
                "peak_bytes": said.memory.peak_bytes,
                "fits": said.fits,
            }
        gc.collect()
        if self.watch.on_gpu:
            torch.cuda.synchronize()
            self.row["set_up_peak_bytes"] = self.most(torch.cuda.max_memory_allocated())
            self.row["after_set_up_bytes"] = self.most(torch.cuda.memory_allocated())
            torch.cuda.empty_cache()
        self.row["set_up_s"] = time.perf_counter() - started

    def step(self, num_tokens: int | None = None) -> float:
        """One optimizer step as training does it; seconds until the GPU of the last rank is done.

        Args:
            num_tokens: Of each row of the batch, less than it has, for a step that only warms up.
        """
        wholes = self._wholes(num_tokens)
        self._wait()
        return self._over_ranks(self._step(wholes))

    def _step(self, wholes: list[Batch]) -> float:
        """What is timed: a step of a batch that is there."""
        parts, groups, watch = self.parts, self.groups, self.watch
        assert parts is not None
        engine, lr = parts.engine, self.config.optimizer.lr
        started = time.perf_counter()
        watch.begin()
        batches = [shard_batch(whole, groups) for whole in wholes]
        valid = count_tokens((batch["shift_labels"] for batch in batches), groups, self.device)
        engine.begin_step(lr)
        total, norm = 0.0, None
        for batch in batches:
            nll = summed_nll(engine, batch, self.device)
            loss = global_token_loss(nll, valid, reducer_divisor=engine.reducer_divisor)
            watch.mark("forward")
            engine.backward(loss)
            watch.mark("backward")
            total += float(groups.all_sum(nll.detach().double()) / valid)  # the loop's wait for the loss
            norm = engine.step(lr)
            watch.mark("optimizer")
        self._wait()
        seconds = time.perf_counter() - started
        watch.end()
        self.row |= {"loss": total, "norm": norm}
        return seconds

    def warm_up(self, tell: Callable[[str], None]) -> None:
        """A short step, for kernels to be compiled, and the host memory that long ones will want pinned."""
        short = WARM_UP_TOKENS * self.groups.sp_size
        if short < self.config.sequence.length:
            tell(f"a step of {short:,} tokens to warm up: {self.step(short):.1f} s")
        self._check()
        if self.plan is None:
            return
        started = time.perf_counter()
        sizes = {part.name: part.host_bytes for part in self.plan.memory.parts}
        is_pinned = pin_ahead(sizes.get(ON_HOST, 0))
        self.groups.barrier()
        if is_pinned:
            seconds = time.perf_counter() - started
            tell(f"{gib(sizes[ON_HOST])} GiB of host memory a process pinned: {seconds:.1f} s")

    def measure(
        self,
        steps: int,
        keep: Callable[[Row], None],
        *,
        first: bool = True,
        profile: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Time steps.

        Args:
            steps: That are timed.
            keep: Is handed the row whenever it has something new.
            first: Whether a step is made before these, that is not among them.
            profile: One more step is taken apart.
            tell: Is handed a line after each step.
        """
        row = self.row
        if first:
            row["first_step_s"] = self.step()
            if self.watch.on_gpu:
                row["first_step_peak_bytes"] = self.most(self.watch.peak_bytes)
            tell(f"first step: {row['first_step_s']:.2f} s, not counted")
            keep(row)
            self._check()
        row |= {"steps_s": [], "losses": [], "norms": []}
        phases: list[dict[str, float]] = []
        for number in range(1, steps + 1):
            row["steps_s"].append(self.step())
            row["losses"].append(row["loss"])
            row["norms"].append(row["norm"])
            phases.append(self.watch.seconds)
            row["seconds"] = statistics.median(row["steps_s"])
            row["tokens_per_second"] = self._tokens() / row["seconds"]
            row["phase_s"] = {name: statistics.median(one[name] for one in phases) for name in PHASES}
            self._keep_memory()
            tell(self._line(number, steps))
            keep(row)
            self._check()
        if profile:
            row["profile"] = self._profiled()
            keep(row)

    def _line(self, number: int, steps: int) -> str:
        row = self.row
        text = f"step {number} of {steps}: {row['steps_s'][-1]:.2f} s"
        text += "".join(f", {name} {self.watch.seconds[name]:.2f}" for name in PHASES)
        return text + (f"; peak {row['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in row else "")

    def _profiled(self) -> Row:
        """Of what is timed. The other ranks are ahead by what a profiler takes to start, and wait."""
        from .profile import profile_step

        wholes = self._wholes(None)
        self._wait()
        if self.groups.is_main:
            found = profile_step(partial(self._step, wholes), self.device)
            self.profile_lines = found.table()
            return found.as_json()
        self._step(wholes)
        return {}

    def _keep_memory(self) -> None:
        """Of the steps so far."""
        row = self.row
        row |= {
            "host_pinned_bytes": self.most(pinned_bytes()),
            "host_resident_bytes": self.most(psutil.Process().memory_info().rss),
        }
        if not self.watch.on_gpu:
            return
        outside = outside_bytes()
        reserved = self.watch.reserved_bytes
        earlier = row.get("phase_peak_bytes", {})
        now = {
            "peak_bytes": self.most(self.watch.peak_bytes),
            "reserved_bytes": self.most(reserved),
            "device_used_bytes": self.most(reserved + outside),
            "outside_allocator_bytes": self.most(outside),
        }
        row |= {name: max(size, row.get(name, 0)) for name, size in now.items()}
        row["phase_peak_bytes"] = {
            name: max(self.most(self.watch.peaks[name]), earlier.get(name, 0)) for name in PHASES
        }

    def _check(self) -> None:
        for name in ("loss", "norm"):
            value = self.row.get(name)
            if value is not None and not math.isfinite(value):
                self.row["note"] = f"{name} is {value}"
        if self._gpu_limit is not None:
            self._gpu_limit.check(self.watch.reserved_bytes)
            self._gpu_limit.tighten()

    def _wholes(self, num_tokens: int | None) -> list[Batch]:
        parts, groups, train = self.parts, self.groups, self.config.train
        assert parts is not None
        wholes = list(
            micro_batches(
                parts.train_set,
                seed=train.seed,
                first_sequence=self._step_number * train.global_batch_sequences,
                global_batch=train.global_batch_sequences,
                micro_batch=train.micro_batch_sequences,
                dp_rank=groups.dp_rank,
                dp_size=groups.dp_size,
            )
        )
        for whole in wholes:
            lengths = whole["document_offsets"].diff().tolist()
            assert set(lengths) == {self.document_tokens}, f"documents of {lengths} tokens"
        self._step_number += 1
        return wholes if num_tokens is None else [_cut(whole, num_tokens) for whole in wholes]

    def _tokens(self) -> int:
        return self.config.sequence.length * self.config.train.global_batch_sequences

    def most(self, value: int) -> int:
        """Over all ranks."""
        return round(self._over_ranks(float(value)))

    def _over_ranks(self, value: float) -> float:
        if self.groups.world_size == 1:
            return value
        most = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)

    def _wait(self) -> None:
        if self.watch.on_gpu:
            torch.cuda.synchronize()
        self.groups.barrier()
        if self.watch.on_gpu:
            torch.cuda.synchronize()


def _cut(whole: Batch, num_tokens: int) -> Batch:
    """The first tokens of a row."""
    offsets = whole["document_offsets"]
    end = offsets.new_tensor([num_tokens])
    rows = {name: tensor[:, :num_tokens] for name, tensor in whole.items() if name != "document_offsets"}
    return {**rows, "document_offsets": torch.cat([offsets[offsets < num_tokens], end])}


def pin_ahead(num_bytes: int) -> bool:
    """Make the blocks that layers will keep in, and wait for them: a run has them after its first step.

    Args:
        num_bytes: Of this process.

    Returns:
        Whether there is one such memory to keep in.

    Raises:
        HostMemoryError: The host has not that much.
    """
    memories = [memory for memory in pinned_memory._memories if memory.pins and not memory.closed]
    if len(memories) != 1 or not num_bytes:
        return False
    [memory] = memories
    count = -(-num_bytes // memory.block_bytes)
    with memory.changed:
        while len(memory.blocks) < count:
            memory.await_block(count, num_bytes)
    return True
