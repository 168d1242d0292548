"""DeepSpeed's hostfile, and what its launcher must be told on several nodes."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = ("ssh", "pdsh")
"""What DeepSpeed's way to other nodes calls."""


def read_hostfile(path: str) -> dict[str, int]:
    """Slots (processes) of each node, in the order of their ranks.

    Raises:
        ValueError: There is no such file, or a line that DeepSpeed would not take.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"--hostfile {path}: no such file; check the path (DeepSpeed would train on this machine alone)."
        )
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--hostfile {path} cannot be read ({error}); check that it is a text file."
        ) from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].strip()
        if not words:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", words)
        if match is None or match[1] in slots or int(match[2]) < 1:
            raise ValueError(
                f"{path}, line {number}: {line!r}; each node has one line, such as: node1 slots=8; "
                "correct it."
            )
        slots[match[1]] = int(match[2])
    if not slots:
        raise ValueError(f"{path} names no node; add a line for each, such as: node1 slots=8")
    return slots


def option(words: Sequence[str], *names: str) -> str | None:
    """The value that a command line gives an option of these names, as `--name value` or `--name=value`."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names and equals:
            return value
        if word in names and index + 1 < len(words):
            return words[index + 1]
    return None


def chosen_slots(path: str, launcher_args: Sequence[str]) -> dict[str, int]:
    """Slots of the nodes that take part: what words for DeepSpeed's launcher leave of a hostfile.

    Raises:
        ValueError: They name a node that is not in it, or leave none.
    """
    slots = read_hostfile(path)
    include = _named_slots(option(launcher_args, "--include", "-i"))
    exclude = _named_slots(option(launcher_args, "--exclude", "-e"))
    nodes = _count(launcher_args, "--num_nodes")
    gpus = _count(launcher_args, "--num_gpus", "--num_accelerators")
    unknown = {*include, *exclude} - slots.keys()
    if unknown:
        raise ValueError(
            f"--include or --exclude {min(unknown)}: {path} names {', '.join(slots)} alone; name these."
        )
    if include:
        slots = {host: len(include[host]) or count for host, count in slots.items() if host in include}
    for host, named in exclude.items():
        slots[host] -= len(named) or slots[host]
    slots = {host: gpus if gpus > 0 else count for host, count in slots.items() if count > 0}
    if not slots:
        raise ValueError(f"--exclude {', '.join(exclude)} leaves no node of {path}; leave one.")
    return dict(list(slots.items())[: nodes if nodes > 0 else None])


def _count(launcher_args: Sequence[str], *names: str) -> int:
    """A number that a launcher is given, 0 where it is not."""
    word = option(launcher_args, *names) or "0"
    try:
        return int(word)
    except ValueError as error:
        raise ValueError(f"{names[0]} {word}: no number; use 1 or above, or leave it out.") from error


def _named_slots(words: str | None) -> dict[str, set[str]]:
    """DeepSpeed's `one@two:0,1`, where a node without slots means all of them."""
    named: dict[str, set[str]] = {}
    for words_of_one in (words or "").split("@"):
        host, _, slots = words_of_one.partition(":")
        if host:
            named.setdefault(host, set()).update(slots.split(",") if slots else ())
    return named


def meeting_words(path: str, launcher_args: Sequence[str]) -> list[str]:
    """How the nodes are started and where they meet, in words for DeepSpeed's launcher.

    Returns:
        With `--force_multi` where it goes over pdsh.

    Raises:
        ValueError: A word is missing that DeepSpeed would end without, or a program that it calls.
    """
    first, *others = chosen_slots(path, launcher_args)
    is_loopback = first == "localhost" or first.startswith("127.")
    if "--no_ssh" not in launcher_args:
        _check_ssh(path, (option(launcher_args, "--launcher") or "pdsh").lower())
        if not others and (is_loopback or first == socket.gethostname()):
            return [word for word in launcher_args if word == "--force_multi"]
        return ["--force_multi"]  # DeepSpeed takes any node that is alone for this machine
    rank = option(launcher_args, "--node_rank") or ""
    if not rank.isdigit() or int(rank) > len(others):
        raise ValueError(
            f"--no_ssh needs --node_rank, this node's place among those of {path} that take part"
            f"{f', and it is {rank}' if rank else ''}; give a number from 0 to {len(others)}."
        )
    if option(launcher_args, "--master_addr") is not None:
        return []
    if others and is_loopback:
        raise ValueError(
            f"{path} calls its first node {first}, by which the others cannot reach it; use a name that they "
            "know, or give --master_addr."
        )
    return ["--master_addr", first]  # DeepSpeed would ask it for its address, by ssh


def _check_ssh(path: str, launcher: str) -> None:
    by_hand = "start a launcher on each node: -- --no_ssh --node_rank N"
    if launcher == "slurm":
        raise ValueError(
            "--launcher slurm: DeepSpeed starts scripts by it, and longseq is a module; let Slurm itself "
            "start the processes: srun longseq train CONFIG."
        )
    if launcher != "pdsh":
        raise ValueError(
            f"--launcher {launcher}: its processes are not told their ranks as torch names them; use pdsh, "
            f"or {by_hand}."
        )
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise ValueError(
            f"--hostfile {path}: DeepSpeed starts other nodes through {missing[0]}, which is not here; "
            f"install it, or {by_hand}, torchrun, or srun."
        )


def quote_for_pdsh(word: str) -> str:
    """A word that the shells of the other nodes are to read as it is.

    DeepSpeed hands it on bare, unless it has a space: then in double quotes, with a backslash before its own.
    """
    return re.sub(r"[\\$`]", r"\\\g<0>", word) if " " in word else shlex.quote(word)
