from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tiny_run import Workshop, assert_same_run, environment, losses, records

from longseq.launch import hostfile, launcher
from longseq.launch.checkpoint import newest_checkpoint, read_state
from longseq.launch.config import RunConfig
from longseq.launch.config_file import parse_config
from longseq.launch.hostfile import chosen_slots, quote_for_pdsh
from longseq.launch.launcher import launch, num_processes
from longseq.launch.nodes import ask_to_stop, first_host, meet
from longseq.launch.processes import free_port, is_launched, local_gpu
from longseq.launch.requests import Requests

CLI = [sys.executable, "-m", "longseq.launch.cli"]
HANG_S = 300
"""A command that has not come so far by then never will, however busy the machine is."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("runs"))


def spread(batch: int = 8, micro: int = 1, **parallel: Any) -> RunConfig:
    return parse_config(
        {
            "model": {"name": "some/model"},
            "parallel": parallel,
            "train": {"global_batch_sequences": batch, "micro_batch_sequences": micro},
        }
    )


@pytest.mark.parametrize(
    ("gpus", "config", "expected"),
    [
        (0, spread(), 1),
        (0, spread(ulysses_degree=4), 4),
        (8, spread(), 8),
        (8, spread(batch=6), 6),
        (8, spread(batch=1), 1),
        (8, spread(batch=1, ulysses_degree=8), 8),
        (8, spread(batch=6, micro=3), 2),
        (7, spread(ulysses_degree=2, batch=3), 6),
        (8, spread(num_gpus=2), 2),
        (0, spread(num_gpus=3, batch=3), 3),
    ],
)
def test_as_many_processes_as_gpus_and_batch_allow(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpus: int,
    config: RunConfig,
    expected: int,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert num_processes(config) == expected
    told = "stay idle" in capsys.readouterr().err
    assert told == (config.parallel.num_gpus == "auto" and 0 < expected < gpus)


class Recorder:
    """Stands for the launcher's process."""

    command: list[str]
    environment: dict[str, str]

    def __init__(self, command: list[str], env: dict[str, str], **options: Any) -> None:
        Recorder.command, Recorder.environment = command, env

    status = 0

    def wait(self) -> int:
        return self.status


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(launcher.subprocess, "Popen", Recorder)
    monkeypatch.setattr(launcher, "_gpu_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Recorder


def test_the_launchers_command(
    recorded: type[Recorder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert launch("a.yaml", ["x.y=1"], num_gpus=2, launcher_args=["--bind_cores_to_rank"]) == 0
    words = recorded.command
    assert words[-5:] == ["--module", "longseq.launch.cli", "train", "a.yaml", "x.y=1"]
    assert words[words.index("--num_gpus") + 1] == "2"
    assert "--bind_cores_to_rank" in words
    assert "--master_port" in words

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    launch("a.yaml", [], num_gpus=2, launcher_args=["--master_port", "1234"])
    words = recorded.command
    assert words[words.index("--include") + 1] == "localhost:3,5"
    assert words.count("--master_port") == 1
    with pytest.raises(ValueError, match=r"num_gpus=4 but CUDA_VISIBLE_DEVICES=3,5,7 leaves 3"):
        launch("a.yaml", [], num_gpus=4)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ValueError, match=r"num_gpus=16 but this machine has 8"):
        launch("a.yaml", [], num_gpus=16)


@pytest.fixture
def hosts(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("# two of them\none slots=8\ntwo   slots=4  # half of it\n\n")
    return str(path)


def test_the_command_over_ssh(
    recorded: type[Recorder], monkeypatch: pytest.MonkeyPatch, hosts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert num_processes(spread(batch=12), hosts) == 12
    assert num_processes(spread(batch=12), hosts, ["--include", "one:0,1"]) == 2
    assert num_processes(spread(num_gpus=12, batch=12), hosts) == 12
    assert capsys.readouterr().err == ""  # this machine's GPUs are not what is counted
    launch("a.yaml", [], num_gpus=12, hostfile=hosts)
    words = recorded.command
    assert words[words.index("--hostfile") + 1] == hosts
    assert "--master_port" in words
    assert "--master_addr" not in words  # DeepSpeed asks the first node
    assert "--num_gpus" not in words

    monkeypatch.setattr("shutil.which", lambda name: None if name == "pdsh" else name)
    with pytest.raises(ValueError, match=r"through pdsh, which is not here; .* --no_ssh"):
        launch("a.yaml", [], num_gpus=12, hostfile=hosts)
    for other, way_out in (("SLURM", "srun longseq train"), ("openmpi", "use pdsh, or start a launcher")):
        with pytest.raises(ValueError, match=rf"--launcher {other.lower()}: .*{way_out}"):
            launch("a.yaml", [], num_gpus=12, hostfile=hosts, launcher_args=[f"--launcher={other}"])


def test_a_single_node_of_a_hostfile_is_not_taken_for_this_machine(
    recorded: type[Recorder], monkeypatch: pytest.MonkeyPatch, hosts: str, tmp_path: Path
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(hostfile.socket, "gethostname", lambda: "two")
    launch("a.yaml", ["a=[1,2]"], num_gpus=8, hostfile=hosts, launcher_args=["--include=one"])
    assert recorded.command.count("--force_multi") == 1
    assert recorded.command[-1] == "'a=[1,2]'"  # for the other node's shell
    launch("a.yaml", ["a=[1,2]"], num_gpus=4, hostfile=hosts, launcher_args=["--include=two"])
    assert "--force_multi" not in recorded.command
    assert recorded.command[-1] == "a=[1,2]"


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ([], {"one": 8, "two": 4}),
        (["--include", "two@one:0,3,3"], {"one": 2, "two": 4}),
        (["-i", "two:1"], {"two": 1}),
        (["--exclude=one"], {"two": 4}),
        (["-e", "one:0,1@two:0,1,2,3"], {"one": 6}),
        (["--num_nodes", "1"], {"one": 8}),
        (["--num_nodes", "1", "--num_gpus=2"], {"one": 2}),
        (["--num_accelerators", "3"], {"one": 3, "two": 3}),
        (["--exclude", "one@two"], "leaves no node"),
        (["--include", "three"], "three: .*hosts names one, two alone"),
    ],
)
def test_which_nodes_take_part(hosts: str, words: list[str], left: dict[str, int] | str) -> None:
    if isinstance(left, str):
        with pytest.raises(ValueError, match=left):
            chosen_slots(hosts, words)
        return
    assert list(chosen_slots(hosts, words).items()) == list(left.items())
    assert num_processes(spread(batch=24), hosts, words) == sum(left.values())


def test_nodes_meet_and_are_asked_at_the_first_that_takes_part(
    recorded: type[Recorder], monkeypatch: pytest.MonkeyPatch, hosts: str
) -> None:
    """A second signal does not ask again, but ends the run."""
    asked: list[Any] = []
    monkeypatch.setattr(launcher, "_pass_on", lambda process, number, store: asked.append(store))
    monkeypatch.setattr(
        Recorder, "wait", lambda self: [os.kill(os.getpid(), signal.SIGTERM) for _ in "12"] and 0
    )
    words = ["--no_ssh", "--exclude", "one", "--node_rank"]
    launch("a.yaml", [], num_gpus=4, hostfile=hosts, launcher_args=[*words, "0"])
    assert recorded.command[recorded.command.index("--master_addr") + 1] == "two"
    assert asked == [("two", 29500), None]
    with pytest.raises(ValueError, match="it is 1; give a number from 0 to 0"):
        launch("a.yaml", [], num_gpus=4, hostfile=hosts, launcher_args=[*words, "1"])


@pytest.mark.parametrize(
    "word",
    [
        "a.yaml",
        "model.config={a:1,b:2}",
        "log.run_dir=$HOME/*",
        "a=it's",
        'a="x"',
        "a=\\n`id`",
        "a;b&c>d",
        "",
    ],
)
def test_words_reach_another_node_as_they_were_typed(word: str) -> None:
    for typed in (word, f"{word} and a space"):
        handed = quote_for_pdsh(typed)
        if " " in handed:  # as DeepSpeed does
            handed = '"{}"'.format(handed.replace('"', '\\"'))
        done = subprocess.run(["sh", "-c", f"printf %s {handed}"], capture_output=True, text=True, check=True)
        assert done.stdout == typed


def test_a_run_is_asked_to_stop_only_while_it_looks(tmp_path: Path) -> None:
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert not ask_to_stop("127.0.0.1", port, "SIGTERM")  # it prepares data
        requests = Requests(tmp_path, is_main=True)
        assert requests.stop_asked_by is None
        assert ask_to_stop("127.0.0.1", port, "SIGTERM")
        assert requests.stop_asked_by == "SIGTERM"
        requests.close()
        assert not ask_to_stop("127.0.0.1", port, "SIGTERM")  # it exports the model
    finally:
        dist.destroy_process_group()


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in {
            "RANK": 0,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(
            ValueError, match=rf"MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: .*--master_port N"
        ):
            meet()


def test_the_command_without_ssh(
    recorded: type[Recorder], monkeypatch: pytest.MonkeyPatch, hosts: str, tmp_path: Path
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("RANK", raising=False)
    launch("a.yaml", [], num_gpus=12, hostfile=hosts, launcher_args=["--no_ssh", "--node_rank", "1"])
    words = recorded.command
    assert words[words.index("--master_addr") + 1] == "one"
    assert words[words.index("--master_port") + 1] == "29500"  # on every node, whoever started it
    for wrong in ([], ["--node_rank=2"], ["--node_rank", "x"]):
        with pytest.raises(ValueError, match=r"--no_ssh needs --node_rank, .* from 0 to 1"):
            launch("a.yaml", [], num_gpus=12, hostfile=hosts, launcher_args=["--no_ssh", *wrong])
    here = tmp_path / "here"
    here.write_text("localhost slots=1\ntwo slots=1\n")
    given = ["--no_ssh", "--node_rank=0", "--master_addr=10.0.0.1", "--master_port=1234"]
    launch("a.yaml", [], num_gpus=2, hostfile=str(here), launcher_args=given)
    assert not {"--master_addr", "--master_port"} & set(recorded.command)
    with pytest.raises(ValueError, match=r"calls its first node localhost, by which the others cannot"):
        launch("a.yaml", [], num_gpus=2, hostfile=str(here), launcher_args=given[:2])
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"--hostfile .*RANK is set"):
        launch("a.yaml", [], num_gpus=12, hostfile=hosts, launcher_args=given)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("# nobody\n", "names no node"),
        ("one slots=8\none slots=8\n", "line 2: 'one slots=8'"),
        ("one 8\n", "line 1: 'one 8'; each node has one line, such as: node1 slots=8"),
        ("one slots=0\n", "line 1"),
    ],
)
def test_a_bad_hostfile(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=said):
        num_processes(spread(), str(tmp_path / "hosts"))


def test_slots_that_are_not_the_processes_asked_for(hosts: str) -> None:
    with pytest.raises(ValueError, match=r"parallel.num_gpus=8 but 12 slots of .*hosts take part"):
        num_processes(spread(num_gpus=8), hosts)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("gpu[003-006,9],login1", "gpu003"),
        ("node7", "node7"),
        ("a1,a2", "a1"),
        ("rack[2-3]node[08,11]", "rack2node08"),
        ("10.0.0.[1,3]", "10.0.0.1"),
    ],
)
def test_the_first_node_in_slurms_words(words: str, name: str) -> None:
    assert first_host(words) == name


def test_slurm_tells_a_process_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in told})
    os.environ.update(SLURM_JOB_ID="1234567", SLURM_STEP_NODELIST="gpu[03-05]", SLURM_STEP_ID="0")
    assert not is_launched()  # a batch script's own process
    os.environ.update(SLURM_STEP_NUM_TASKS="9", SLURM_STEP_TASKS_PER_NODE="4(x2),1", SLURM_NODEID="1")
    os.environ.update(SLURM_PROCID="6", SLURM_LOCALID="2")
    assert is_launched()
    place = {name: os.environ[name] for name in told}
    port = int(place.pop("MASTER_PORT"))
    assert list(place.values()) == ["6", "2", "9", "4", "gpu03"]
    assert 10000 <= port < 30000
    del os.environ["RANK"], os.environ["MASTER_PORT"]
    os.environ["SLURM_STEP_ID"] = "1"
    assert is_launched()
    assert int(os.environ["MASTER_PORT"]) != port


@pytest.mark.parametrize(
    ("rank", "count", "visible", "mine"),
    [
        ("3", 8, "", 3),
        ("3", 1, "GPU-5", 0),
        ("0", 1, "", 0),
        ("3", 1, "0,1,2,3", None),
        ("4", 4, "", None),
        ("3", 1, "", None),  # a machine of one GPU, and launchers that were told of more
    ],
)
def test_which_gpu_is_a_processes_own(
    monkeypatch: pytest.MonkeyPatch, rank: str, count: int, visible: str, mine: int | None
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("SLURM_LOCALID", "0")  # as it is for a launcher under srun
    if mine is not None:
        assert local_gpu(count) == mine
        return
    with pytest.raises(ValueError, match=rf"has {count} GPUs .* process {int(rank) + 1} .* slots"):
        local_gpu(count)
    monkeypatch.setenv("SLURM_LOCALID", rank)
    if count == 1:
        assert local_gpu(count) == 0  # srun may hide the others from each


def test_a_worker_that_was_killed_is_told_of(
    recorded: type[Recorder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for status, told in ((0, ""), (1, ""), (2, ""), (247, "SIGKILL; the machine may have run out of memory")):
        monkeypatch.setattr(Recorder, "status", status)
        assert launch("a.yaml", [], num_gpus=2) == status
        error = capsys.readouterr().err
        assert told in error
        assert bool(error) == bool(told)


def test_signals_are_given_back(recorded: type[Recorder]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    launch("a.yaml", [], num_gpus=2)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def assert_no_noise(*texts: str) -> None:
    for noise in ("Traceback", "Warning", "[WARNING]", "[INFO]", "[ERROR]", "it/s"):
        for text in texts:
            assert noise not in text, text


# The tests below are slow: each starts two processes that import torch and DeepSpeed.


@pytest.mark.slow
def test_ulysses_on_the_command_line_is_the_run_of_one_process(shop: Workshop) -> None:
    """Two processes with half of every sequence each: losses to 5e-7, weights to 1e-6 after steps of 1e-2."""
    yaml = shop.yaml("ulysses", "parallel.ulysses_degree=2", "train.eval_every=2")
    done = subprocess.run([*CLI, "train", str(yaml)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = shop.run("alone", "train.eval_every=2")
    assert_same_run(shop.folder / "ulysses", alone, relative=5e-7, absolute=1e-6)
    assert read_state(newest_checkpoint(shop.folder / "ulysses")).world_size == 2
    assert done.stdout.count("step 4/4") == 1
    assert_no_noise(done.stdout, done.stderr)


def signalled(yaml: Path, run: Path, number: int) -> tuple[int, str]:
    """Exit status and output of a command whose process group gets a signal once two steps are done."""
    # Tests in a shell's background (`make test &`) ignore Ctrl-C, and so would all that they start.
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*CLI, "train", str(yaml)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, earlier)
    try:
        deadline = time.monotonic() + HANG_S
        while not (run / "metrics.jsonl").is_file() or len(losses(run)) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, number)
        printed, _ = process.communicate(timeout=HANG_S)
    finally:
        process.terminate()
    return process.returncode, printed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_command_saves_and_stops_all(shop: Workshop, number: int) -> None:
    name = signal.Signals(number).name
    long = ("train.steps=100000", "parallel.num_gpus=2")
    run = shop.folder / name
    status, printed = signalled(shop.yaml(name, *long), run, number)
    assert status == 0, printed
    assert_no_noise(printed)
    assert f"stopped by {name}" in records(run, "note")[0]["text"]
    stopped = read_state(newest_checkpoint(run)).step
    assert stopped == len(losses(run)) >= 2
    if number == signal.SIGUSR1:
        return  # what was saved is no other
    # One process goes on where two have stopped: without ZeRO a checkpoint does not know of either.
    longer = f"train.steps={stopped + 2}"
    resumed = shop.run(name, longer)
    assert_same_run(resumed, shop.run(f"{name}-whole", longer), relative=1e-5, absolute=1e-4)


@pytest.mark.slow
def test_ctrl_c_ends_all_at_once(shop: Workshop) -> None:
    yaml = shop.yaml("ctrl_c", "train.steps=100000", "parallel.num_gpus=2")
    status, printed = signalled(yaml, shop.folder / "ctrl_c", signal.SIGINT)
    assert status == 130
    assert printed.count("longseq train: interrupted") == 1
    assert_no_noise(printed)


@pytest.mark.slow
def test_torchrun_joins(shop: Workshop) -> None:
    yaml = shop.yaml("torchrun", "parallel.zero_stage=1")
    words = ["--nproc_per_node", "2", "--standalone", "-m", "longseq.launch.cli", "train", str(yaml)]
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(shop.folder / "torchrun", shop.run("one"), relative=5e-7, absolute=1e-6)
    assert_no_noise(done.stdout, done.stderr)


@pytest.mark.slow
def test_what_is_wrong_is_said_once(shop: Workshop, tmp_path: Path) -> None:
    """The first process alone reads the data; the others only learn that it has gone."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"words": 3}\n')
    yaml = shop.yaml("bad", "parallel.num_gpus=2", f"data.source={bad}")
    done = subprocess.run([*CLI, "train", str(yaml)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("longseq train: ") == 1
    assert "bad.jsonl" in done.stderr
    assert_no_noise(done.stdout, done.stderr)
