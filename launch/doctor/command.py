"""The checks of `longseq doctor` in their order: the machine, what a config needs of it, and all together."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .attention import Problem, check_attention, read_attention
from .communication import check_ping
from .disk import check_place, hub_home, read_place
from .findings import Finding, error, has_errors, show
from .gpu import Cuda, check_cuda, read_cuda
from .hub import check_repository, read_repositories
from .links import check_links, read_links
from .ping import start_ping
from .system import check_system, read_system
from .versions import check_versions, read_versions
from .zero import DeepSpeedTrial, check_deepspeed

if TYPE_CHECKING:
    from ..config import ModelConfig, RunConfig

EXAMINED = "LONGSEQ_MACHINE_EXAMINED"
"""Set for the processes that a doctor starts: it has looked at their machine already."""


def doctor(config: RunConfig | None = None, *, ping: bool = True, where: str = "") -> int:
    """Look at this machine, and print what was found as it is found.

    Args:
        config: What is to run here, if that is known.
        ping: Whether to start processes that talk to each other.
        where: Name of the machine, where there are several.

    Returns:
        Exit status: 1 where anything stops a run or makes it wrong.
    """
    is_bad = False
    for findings in examine_machine(config, ping=ping):
        show(findings, where)
        is_bad = is_bad or has_errors(findings)
    return int(is_bad)


def examine(config: RunConfig) -> int:
    """Run the checks of this process, alone or as one of those that a launcher started.

    One process of each machine looks at that, unless who started it has done so; all of them together check
    that a sequence over several processes gives what one gives.

    Returns:
        Exit status: 0 when all is well, 1 when something is not.
    """
    from .sequence_parallel import examine_together

    status = 0
    if "RANK" in os.environ and EXAMINED not in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        status = doctor(config, ping=False, where=socket.gethostname())
    return max(status, examine_together(config))


def examine_machine(config: RunConfig | None, *, ping: bool) -> Iterator[list[Finding]]:
    """The findings on this machine, one check after the other."""
    trial = DeepSpeedTrial(config) if config is not None and config.parallel.zero_stage != 0 else None
    yield check_versions(read_versions())
    cuda = read_cuda()
    greeting = start_ping("gloo", 2) if ping and not cuda.gpus else None
    yield check_cuda(cuda, "bf16" if config is None else config.train.precision)
    if len(cuda.gpus) > 1:
        yield check_links(read_links(len(cuda.gpus)))
        # Not beside the copies that were timed.
        greeting = start_ping("nccl", len(cuda.gpus)) if ping else None
    yield check_system(read_system(bool(cuda.gpus)))
    yield from _examine_for(config, cuda)
    if trial is not None:
        yield check_deepspeed(trial.result())
    if greeting is not None:
        yield check_ping(greeting.result())


def _examine_for(config: RunConfig | None, cuda: Cuda) -> Iterator[list[Finding]]:
    """What a config concerns: its kernels, its folders, its model."""
    from ..data.cache import cache_root

    hf_config: Any = None
    if config is not None:
        model, is_there = config.model, True
        for repository in read_repositories(config):
            findings = check_repository(repository)
            yield findings
            if repository.key == "model.name":
                is_there = not has_errors(findings)
                # From the cache itself: the hub, out of reach, would be asked again and again.
                model = model.model_copy(update={"name": repository.cached_at or repository.name})
        if is_there:
            hf_config, complaint = _architecture(model)
            yield complaint
    problem = Problem() if config is None or hf_config is None else Problem.of(config, hf_config)
    yield check_attention(read_attention(problem, bool(cuda.gpus)))
    yield check_place(read_place("the tokens' cache", cache_root(config.data.cache_dir if config else None)))
    yield check_place(read_place("Hugging Face's cache", hub_home()))
    if config is not None:
        needed, words = 0, ""
        if hf_config is not None:
            try:
                needed, words = _checkpoints(config, hf_config)
            except ValueError as refused:
                yield [error(str(refused).rstrip("."), "")]
        yield check_place(read_place("log.run_dir", Path(config.log.run_dir), needed, words))


def _architecture(model: ModelConfig) -> tuple[Any, list[Finding]]:
    from ..model import check_model, hf_config

    try:
        check_model(model)
        return hf_config(model), []
    except ValueError as refused:
        return None, [error(str(refused).rstrip("."), "")]


def _checkpoints(config: RunConfig, hf_config: Any) -> tuple[int, str]:
    """Bytes that the checkpoints of a run will take: those kept, and the one being written; and their words.

    A run that goes on has some already, whose room is not free any more.
    """
    from ..checkpoint_folder import CHECKPOINTS_DIR
    from ..planner.workload import Workload

    work = Workload.from_config(config, hf_config)
    each = work.trained_numel * (2 if work.rounds_weights else 4) + work.state_bytes
    count = config.checkpoint.keep + 1
    words = f"{count} checkpoints (checkpoint.keep={config.checkpoint.keep} and a new one)"
    files = (Path(config.log.run_dir) / CHECKPOINTS_DIR).expanduser().rglob("*")
    there = sum(path.stat().st_size for path in files if path.is_file())
    if there:
        words += ", less what is there of them,"
    return max(0, count * each - there), words
