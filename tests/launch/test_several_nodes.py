"""Several nodes: their launchers on one machine, joined over loopback, train what one process trains."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from gloo import run_cases
from tiny_run import Workshop, assert_same_run, environment, losses, records

from longseq.distributed import ProcessGroups
from longseq.launch.checkpoint import newest_checkpoint, read_state
from longseq.launch.nodes import check_nodes, require_same
from longseq.launch.processes import free_port

# Slow: each of these runs starts two launchers, and these two processes that import torch and DeepSpeed.
pytestmark = pytest.mark.slow

CLI = [sys.executable, "-m", "longseq.launch.cli"]
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SHARED = ("parallel.ulysses_degree=2",)
FOREVER = "train.steps=100000"

# What stands for programs of a cluster. Tasks on "other machines" are no children of the one who asked.
PDSH = """#!{python}
import os, subprocess, sys, tempfile, time
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = " ".join(words[words.index("-w") + 2 :])
folder = tempfile.mkdtemp()
for place, host in enumerate(hosts):
    line = command.replace("%n", str(place)) + f"; echo $? > {{folder}}/{{place}}"
    subprocess.run(["setsid", "--fork", "bash", "-c", line], check=True)
while len(os.listdir(folder)) < len(hosts):
    time.sleep(0.1)
time.sleep(0.1)
sys.exit(max(int(open(f"{{folder}}/{{name}}").read()) for name in os.listdir(folder)))
"""
SSH = """#!/bin/bash
echo 127.0.0.1
"""
SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
step = {{"SLURM_JOB_ID": os.environ["JOB"], "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "127.0.0.[1,3]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}}
tasks = [subprocess.Popen(words, env={{**os.environ, **step, "SLURM_PROCID": str(node),
    "SLURM_LOCALID": "0", "SLURM_NODEID": str(node)}}) for node in range(2)]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
LONGSEQ = """#!/bin/bash
exec {python} -m longseq.launch.cli "$@"
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A PATH on which the programs of a cluster stand."""
    folder = tmp_path_factory.mktemp("bin")
    for name, text in {"pdsh": PDSH, "ssh": SSH, "srun": SRUN, "longseq": LONGSEQ}.items():
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def hostfile(folder: Path, *slots: int) -> str:
    names = ("127.0.0.1", "localhost", "ip6-localhost")
    path = folder / f"hosts{''.join(map(str, slots))}"
    path.write_text("".join(f"{name} slots={count}\n" for name, count in zip(names, slots, strict=False)))
    return str(path)


class Nodes:
    """Commands that run beside each other, and what they print."""

    def __init__(self, commands: list[list[str]], environments: list[dict[str, str]]) -> None:
        self.running = [
            subprocess.Popen(
                command,
                env=environment(**more),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for command, more in zip(commands, environments, strict=True)
        ]

    def await_steps(self, run: Path, steps: int) -> None:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").is_file() or len(losses(run)) < steps:
            assert all(process.poll() is None for process in self.running), self.finish()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def finish(self) -> list[tuple[int, str]]:
        """Exit status and output of each."""
        try:
            printed = [process.communicate(timeout=180)[0] for process in self.running]
        finally:
            for process in self.running:
                if process.poll() is None:  # DeepSpeed's launcher has a session of its own
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                    process.kill()
        return [(process.returncode, text) for process, text in zip(self.running, printed, strict=True)]


def no_ssh(yaml: Path, port: int, hosts: list[str], ranks: tuple = (0, 1)) -> Nodes:
    """`longseq train` on each node, with launchers that know each other's place alone."""
    meeting = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    commands = [
        [*CLI, "train", str(yaml), "--hostfile", file, "--", "--no_ssh", "--node_rank", str(rank), *meeting]
        for rank, file in zip(ranks, hosts, strict=True)
    ]
    return Nodes(commands, [{}] * len(commands))


def assert_stopped(shop: Workshop, name: str, by: str) -> None:
    """Saved at its last step, with the losses of one process until there."""
    run = shop.folder / name
    assert f"stopped by {by}" in records(run, "note")[0]["text"]
    stopped = read_state(newest_checkpoint(run))
    assert stopped.step == len(losses(run)) >= 2
    assert stopped.world_size == 2
    assert [path.name for path in sorted((newest_checkpoint(run) / "rng").iterdir())] == [
        "rank-00000.pt",
        "rank-00001.pt",
    ]
    alone = losses(shop.run(f"{name}-alone", f"train.steps={stopped.step}"))
    assert losses(run) == pytest.approx(alone, rel=1e-5)


def test_torchrun_on_nodes_that_share_no_cache(shop: Workshop, tmp_path: Path) -> None:
    yaml = shop.yaml("torchrun", *SHARED, "parallel.zero_stage=3")
    port, caches = free_port(), [tmp_path / "cache-0", tmp_path / "cache-1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(port), "--node-rank"]
    commands = [[*torchrun, str(rank), "-m", "longseq.launch.cli", "train", str(yaml)] for rank in range(2)]
    ended = Nodes(commands, [{"LONGSEQ_CACHE": str(cache)} for cache in caches]).finish()
    assert [status for status, _ in ended] == [0, 0], ended
    assert_same_run(shop.folder / "torchrun", shop.run("alone"), relative=5e-7, absolute=1e-6)
    assert [len(list((cache / "tokens").glob("*[!k]"))) for cache in caches] == [2, 2]


def test_deepspeed_launchers_without_ssh_save_when_one_is_told_to_stop(shop: Workshop) -> None:
    yaml = shop.yaml("no_ssh", *SHARED, "parallel.zero_stage=1", FOREVER)
    nodes = no_ssh(yaml, free_port(), [hostfile(shop.folder, 1, 1)] * 2)
    nodes.await_steps(shop.folder / "no_ssh", 2)
    nodes.running[1].send_signal(signal.SIGTERM)
    ended = nodes.finish()
    assert [status for status, _ in ended] == [0, 0], ended
    assert_stopped(shop, "no_ssh", "another rank")


def test_deepspeed_over_ssh_saves_when_told_to_stop(shop: Workshop, cluster: dict[str, str]) -> None:
    yaml = shop.yaml("ssh", *SHARED, FOREVER)
    name = "ssh$0{a,b}"  # which other nodes' shells must leave as it is
    words = [str(yaml), f"log.run_dir={shop.folder / name}", "--hostfile", hostfile(shop.folder, 1, 1)]
    nodes = Nodes([[*CLI, "train", *words]], [cluster])
    nodes.await_steps(shop.folder / name, 2)
    nodes.running[0].send_signal(signal.SIGTERM)
    ended = nodes.finish()
    assert [status for status, _ in ended] == [0], ended
    assert_stopped(shop, name, "SIGTERM")


def test_the_sbatch_script_saves_when_its_time_is_up(shop: Workshop, cluster: dict[str, str]) -> None:
    yaml = shop.yaml("slurm", *SHARED)
    job = {**cluster, "SLURM_CPUS_PER_TASK": "1", "JOB": str(free_port())}
    nodes = Nodes([["bash", str(EXAMPLES / "slurm.sbatch"), str(yaml), FOREVER]], [job])
    nodes.await_steps(shop.folder / "slurm", 2)
    (srun,) = psutil.Process(nodes.running[0].pid).children()
    srun.send_signal(signal.SIGUSR1)  # as Slurm does to a job's steps
    ended = nodes.finish()
    assert [status for status, _ in ended] == [0], ended
    assert_stopped(shop, "slurm", "SIGUSR1")


def test_launchers_that_were_told_different_things_say_so(shop: Workshop) -> None:
    """Two nodes of unlike hostfiles; three of which two have one place, and the third never comes."""
    yaml = shop.yaml("disagree", FOREVER, "train.global_batch_sequences=6")
    two, three = hostfile(shop.folder, 1, 1), hostfile(shop.folder, 1, 1, 1)
    groups = {
        "WORLD_SIZE=2 on .* rank 1 counts 3 on ": no_ssh(yaml, free_port(), [two, three]),
        "two processes are rank 1": no_ssh(yaml, free_port(), [three] * 3, ranks=(0, 1, 1)),
    }
    for said, nodes in groups.items():
        for status, printed in nodes.finish():
            assert status != 0
            assert re.search(rf"longseq train: {said}.*the same hostfile", printed), printed


def test_different_configs(shop: Workshop) -> None:
    yaml, other = shop.yaml("one-config", *SHARED), shop.yaml("other-config", *SHARED, "optimizer.lr=2e-2")
    hosts, port = hostfile(shop.folder, 1, 1), free_port()
    first, second = no_ssh(yaml, port, [hosts], (0,)), no_ssh(other, port, [hosts], (1,))
    for nodes in (first, second):
        ((status, printed),) = nodes.finish()
        assert status != 0
        assert "longseq train: optimizer.lr is 0.02 on rank 1" in printed, printed


def own_folder_case(yaml: str, folders: list[str]) -> str:
    """What a rank hears whose run's folder is another machine's."""
    from longseq.launch.config_file import load_config

    groups = ProcessGroups.create()
    run_dir = folders[groups.rank]
    config = load_config(yaml, [f"log.run_dir={run_dir}"])
    if folders[0] == folders[1]:
        check_nodes(config, groups)
        return "nothing"
    with pytest.raises(ValueError, match=r"log\.run_dir=") as refused:
        check_nodes(config, groups)
    return str(refused.value)


def refused_case(yaml: str, overrides: list[list[str]]) -> str:
    from longseq.launch.config_file import load_config

    groups = ProcessGroups.create()
    with pytest.raises(ValueError, match=r"rank 0") as refused:
        check_nodes(load_config(yaml, overrides[groups.rank]), groups)
    return str(refused.value)


def other_words_case() -> str:
    groups = ProcessGroups.create()
    require_same({"the data": "same"}, groups, "do better")
    with pytest.raises(ValueError, match="do better") as refused:
        require_same({"the data": "same", "the tokens": str(groups.rank)}, groups, "do better")
    with pytest.raises(ValueError, match=r"rank 1 is 1 on rank 1 .*, and None on rank 0"):
        require_same({f"rank {groups.rank}": "1"} if groups.rank else {}, groups, "do better")
    return str(refused.value)


def test_every_rank_hears_what_differs(shop: Workshop, tmp_path: Path) -> None:
    yaml = str(shop.yaml("folders"))
    folders = {
        "own": [str(tmp_path / "node0"), str(tmp_path / "node1")],
        "shared": [str(tmp_path / "shared")] * 2,
    }
    cases: dict[str, Any] = {
        name: (own_folder_case, {"yaml": yaml, "folders": paths}) for name, paths in folders.items()
    }
    (tmp_path / "file").write_text("")
    unwritable = [f"log.run_dir={tmp_path / 'file' / 'run'}"]
    cases["unwritable"] = (refused_case, {"yaml": yaml, "overrides": [unwritable] * 2})
    for rank in range(2):  # one path, with other things in it on another node
        (tmp_path / f"{rank}.json").write_text(f'{{"steps_per_print": {rank + 7}}}')
    by_path = [
        ["parallel.zero_stage=1", f"parallel.deepspeed_config={tmp_path / f'{r}.json'}"] for r in (0, 1)
    ]
    cases["json"] = (refused_case, {"yaml": yaml, "overrides": by_path})
    found = run_cases(2, {**cases, "words": (other_words_case, {})})
    for said in found["unwritable"]:
        assert re.search(r"log\.run_dir=.*file/run cannot be written on rank 0 .*name another folder", said)
    for said in found["json"]:
        assert said.startswith("parallel.deepspeed_config.steps_per_print is 8 on rank 1 (")
    for said in found["own"]:
        assert "on rank 1" in said
        assert "name a folder that all nodes share" in said
    assert found["shared"] == ["nothing"] * 2
    assert list((tmp_path / "shared").iterdir()) == []
    assert all(said.startswith("the tokens is 1 on rank 1 (") for said in found["words"])
    assert all(", and 0 on rank 0 (" in said for said in found["words"])
