"""DeepSpeed's hostfile, and what its launcher must be told on several nodes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

CHOOSING = ("--include", "-i", "--exclude", "-e", "--num_nodes", "--num_gpus", "--num_accelerators")
"""Options of DeepSpeed's launcher by which fewer GPUs take part than the hostfile has slots."""

PROGRAMS = {"pdsh": ("ssh", "pdsh"), "slurm": ("ssh", "srun")}
"""DeepSpeed's ways to other nodes, and the programs that each of them calls."""


def read_hostfile(path: str) -> dict[str, int]:
    """Slots (processes) of each node, in the order of their ranks.

    Raises:
        ValueError: There is no such file, or a line that DeepSpeed would not take.
    """
    if not Path(path).is_file():
        raise ValueError(f"--hostfile {path}: no such file; DeepSpeed would train on this machine alone.")
    slots: dict[str, int] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        words = line.split("#")[0].strip()
        if not words:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", words)
        if match is None or match[1] in slots or int(match[2]) < 1:
            raise ValueError(
                f"{path}, line {number}: {line!r}; each node has one line, such as: node1 slots=8"
            )
        slots[match[1]] = int(match[2])
    if not slots:
        raise ValueError(f"{path} names no node; each has a line, such as: node1 slots=8")
    return slots


def option(words: Sequence[str], name: str) -> str | None:
    """The value that a command line gives an option, as `--name value` or `--name=value`."""
    for index, word in enumerate(words):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and index + 1 < len(words):
            return words[index + 1]
    return None


def total_slots(path: str, launcher_args: Sequence[str]) -> int | None:
    """Processes that a hostfile starts; None where words for DeepSpeed's launcher choose some of them."""
    slots = read_hostfile(path)
    if any(word.partition("=")[0] in CHOOSING for word in launcher_args):
        return None
    return sum(slots.values())


def master_words(path: str, launcher_args: Sequence[str]) -> list[str]:
    """Where the nodes meet, in words for DeepSpeed's launcher; checks that it can start them.

    Raises:
        ValueError: A word is missing that DeepSpeed would end without, or a program that it calls.
    """
    hosts = list(read_hostfile(path))
    if "--no_ssh" not in launcher_args:
        launcher = (option(launcher_args, "--launcher") or "pdsh").lower()
        if launcher not in PROGRAMS:
            raise ValueError(
                f"--launcher {launcher}: its processes are not told their ranks as torch names them; use "
                f"{' or '.join(PROGRAMS)}, or start a launcher on each node: -- --no_ssh --node_rank N."
            )
        missing = [name for name in PROGRAMS[launcher] if shutil.which(name) is None]
        if missing:
            raise ValueError(
                f"--hostfile {path}: DeepSpeed starts other nodes through {missing[0]}, which is not here; "
                "install it, or start a launcher on each node: -- --no_ssh --node_rank N, torchrun, or srun."
            )
        return []
    rank = option(launcher_args, "--node_rank") or ""
    if not rank.isdigit() or int(rank) >= len(hosts):
        raise ValueError(
            f"--no_ssh needs --node_rank, this node's place in {path}, from 0 to {len(hosts) - 1}"
            f"{f'; it is {rank}' if rank else ''}."
        )
    if option(launcher_args, "--master_addr") is not None:
        return []
    first = hosts[0]
    if len(hosts) > 1 and (first == "localhost" or first.startswith("127.")):
        raise ValueError(
            f"{path} calls its first node {first}, by which the others cannot reach it; use a name that they "
            "know, or give --master_addr."
        )
    return ["--master_addr", first]  # DeepSpeed would ask it for its address, by ssh
