"""Command lines that ask for what cannot be done: words, options, GPUs, hostfiles, plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bad_inputs import Case, Place, check, parametrized
from tiny_run import Workshop


@pytest.fixture(scope="module")
def place_of_all(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, dict[str, Path]]:
    """Good documents and configs, and a run of one step."""
    shop = Workshop(tmp_path_factory.mktemp("shop"))
    return shop, {"trained": shop.run("trained", "train.steps=1")}


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


def words(name: str, given: str, *says: str) -> Case:
    """Words as they stand."""
    return Case(name, lambda place: given.split(), says)


def command(name: str, verb: str, given: str, *says: str, overrides: tuple[str, ...] = ()) -> Case:
    """A command with a good config and options."""
    return Case(name, lambda place: [verb, place.yaml(*overrides), *given.split()], says)


def hosts(name: str, content: str, *says: str, behind: str = "") -> Case:
    """A hostfile of that content."""

    def make(place: Place) -> list[str | Path]:
        return ["train", place.yaml(), "--hostfile", place.write("hosts", content), *behind.split()]

    return Case(name, make, says)


def plots(name: str, make: Callable[[Place], list[str | Path]], *says: str) -> Case:
    """What `plot` is given."""
    return Case(name, lambda place: ["plot", *make(place)], says)


def metrics(content: str | bytes) -> Callable[[Place], list[str | Path]]:
    """A run whose metrics.jsonl has that content."""
    return lambda place: [place.write("run/metrics.jsonl", content).parent]


WORDS = (
    words("no command", "", "COMMAND"),
    words("a command there is not", "trian tiny-cpu", "trian", "train"),
    words("no config", "train", "CONFIG"),
    words("an option there is not", "train tiny-cpu --steps 3", "--steps"),
    words("an option without its value", "train tiny-cpu --num-gpus", "--num-gpus"),
    words("words for no launcher", "prepare tiny-cpu -- --no_ssh", "--no_ssh", "words behind -- are for"),
    words("a preset there is not", "config show tiny-cpux", "did you mean tiny-cpu?"),
    words("no preset to show", "config show", "preset"),
    words("no verb", "config", "VERB"),
    words("an export without a place", "export runs/x", "out"),
)

PROCESSES = (
    command("words for GPUs", "train", "--num-gpus two", "--num-gpus", "two"),
    command("half a GPU", "train", "--num-gpus 1.5", "--num-gpus", "1.5"),
    command("no GPU", "train", "--num-gpus 0", "parallel.num_gpus=0 must be a whole number (1 or above"),
    command(
        "minus one GPU", "train", "--num-gpus -1", "parallel.num_gpus=-1 must be a whole number (1 or above"
    ),
    command(
        "more GPUs than sequences",
        "train",
        "--num-gpus 3",
        "train.global_batch_sequences=2 must be a multiple of 3",
    ),
    command("restarts that are negative", "train", "--max-restarts -1", "--max-restarts", "-1"),
    command("restarts that are a word", "train", "--max-restarts many", "--max-restarts", "many"),
    command("words for a launcher that is not started", "train", "-- --no_ssh", "--no_ssh", "leave it out"),
    command(
        "no hostfile", "train", "--hostfile no/hosts", "--hostfile no/hosts: no such file", "check the path"
    ),
    hosts("an empty hostfile", "", "hosts names no node"),
    hosts("comments alone in a hostfile", "# node1 slots=8\n", "hosts names no node"),
    hosts("a node without slots", "node1\n", "hosts, line 1: 'node1'", "such as: node1 slots=8"),
    hosts("a node of no slots", "node1 slots=0\n", "hosts, line 1", "such as: node1 slots=8"),
    hosts("a node twice", "a slots=1\na slots=1\n", "hosts, line 2", "such as: node1 slots=8"),
    hosts("a hostfile that is no text", "\x00\x01 slots\n", "hosts, line 1", "such as: node1 slots=8"),
    hosts(
        "a node that is not in it",
        "a slots=1\nb slots=1\n",
        "--include or --exclude c",
        behind="-- --include c:0",
    ),
    hosts(
        "every node left out",
        "a slots=1\n",
        "--exclude a leaves no node",
        "leave one",
        behind="-- --exclude a",
    ),
    hosts(
        "other slots than GPUs",
        "a slots=1\nb slots=1\n",
        "parallel.num_gpus=4 but 2 slots",
        "leave it out",
        behind="parallel.num_gpus=4 train.global_batch_sequences=4",
    ),
    hosts(
        "a rank past the nodes",
        "a slots=1\nb slots=1\n",
        "--node_rank",
        "from 0 to 1",
        behind="-- --no_ssh --node_rank 5",
    ),
    hosts(
        "a number of nodes that is a word",
        "a slots=1\nb slots=1\n",
        "--num_nodes",
        "two",
        behind="-- --num_nodes two",
    ),
    command("a doctor for no GPU", "doctor", "--num-gpus 0", "parallel.num_gpus=0 must be a whole number"),
    command("a doctor with a bad config", "doctor", "train.stepz=3", "did you mean train.steps"),
)

PLOTS = (
    plots(
        "a plot of nothing", lambda place: [place.folder / "no"], "no: no such file; give the folder of a run"
    ),
    plots(
        "a plot of no metrics",
        lambda place: [place.write("run/config.yaml", "").parent],
        "no such file; give the folder",
    ),
    plots("a plot of empty metrics", metrics(""), "run: holds no step yet; plot it once"),
    plots(
        "a plot of no step",
        metrics('{"kind": "note", "step": 0, "text": "a"}\n'),
        "run: holds no step yet; plot it once",
    ),
    plots(
        "a plot of a broken line",
        metrics('{"kind": "step"\n{}\n'),
        "metrics.jsonl:1: not JSON",
        "delete that line",
    ),
    plots(
        "a plot of other records",
        metrics('{"a": 1}\n'),
        'metrics.jsonl:1: not a record with a "kind"; delete that line',
    ),
    plots("a plot of bytes", metrics(b"\xff\xfe\n\n"), "metrics.jsonl:1: not JSON", "delete that line"),
    plots("a plot of records without values", metrics('{"kind": "step"}\n'), "metrics.jsonl", "delete"),
    plots(
        "a plot of words for numbers",
        metrics('{"kind": "step", "step": 1, "loss": "low"}\n'),
        "metrics.jsonl",
        "delete",
    ),
    plots(
        "a plot of a good run and a bad one",
        lambda place: [place.runs["trained"], place.folder / "no"],
        "no: no such file",
    ),
    plots(
        "a plot of an unknown ending",
        lambda place: [place.runs["trained"], "--out", place.folder / "a.txt"],
        "a.txt: unknown kind of image; let the name end in",
    ),
    plots(
        "a plot without an ending",
        lambda place: [place.runs["trained"], "--out", place.folder / "a"],
        "unknown kind of image; let the name end in",
    ),
    plots(
        "a plot over a folder",
        lambda place: [place.runs["trained"], "--out", place.write("a.png/mine", "").parent],
        "a.png",
    ),
    plots(
        "a plot below a file",
        lambda place: [place.runs["trained"], "--out", place.write("mine", "") / "a.png"],
        "a.png",
    ),
    plots(
        "a plot where nobody may write",
        lambda place: [place.runs["trained"], "--out", "/proc/a.png"],
        "/proc/a.png",
    ),
)

PLANS = (
    command("a plan for an unknown GPU", "plan", "--gpu h101", "--gpu", "h101"),
    command("a plan for a GPU of no name", "plan", "--gpu =", "--gpu"),
    command("a plan for no GPU", "plan", "--gpu h100-80g --num-gpus 0", "parallel.num_gpus=0"),
    command("a plan for minus two GPUs", "plan", "--gpu h100-80g --num-gpus -2", "parallel.num_gpus=-2"),
    command("a plan for GPUs in words", "plan", "--gpu h100-80g --num-gpus two", "--num-gpus", "two"),
    command("a plan for nodes of no GPU", "plan", "--gpu h100-80g --gpus-per-node 0", "--gpus-per-node"),
    command(
        "a plan for nodes of minus one GPU", "plan", "--gpu h100-80g --gpus-per-node -1", "--gpus-per-node"
    ),
    command(
        "a plan for nodes that do not divide",
        "plan",
        "--gpu h100-80g --num-gpus 8 --gpus-per-node 3 train.global_batch_sequences=8",
        "--gpus-per-node",
    ),
    command(
        "a plan for host memory in words",
        "plan",
        "--gpu h100-80g --host-memory lots",
        "--host-memory",
        "lots",
    ),
    command(
        "a plan for negative host memory", "plan", "--gpu h100-80g --host-memory=-5G", "--host-memory", "-5G"
    ),
    command("a plan for no host memory", "plan", "--gpu h100-80g --host-memory 0", "--host-memory"),
    command(
        "a plan for host memory in an unknown unit",
        "plan",
        "--gpu h100-80g --host-memory 1.9X",
        "--host-memory",
        "1.9X",
    ),
    command(
        "a plan drawn with an unknown ending",
        "plan",
        "--gpu h100-80g --plot plan.txt",
        "plan.txt",
        "let the name end in",
    ),
    command(
        "a plan drawn where nobody may write",
        "plan",
        "--gpu h100-80g --plot /proc/plan.png",
        "/proc/plan.png",
    ),
    command("a plan that measures a GPU that is not here", "plan", "--calibrate", "--calibrate"),
    command("a plan of a bad config", "plan", "--gpu h100-80g train.stepz=3", "did you mean train.steps"),
    command(
        "a plan of a model that is not there",
        "plan",
        "--gpu h100-80g model.name=./nowhere model.config={}",
        "model.name='./nowhere'",
        "Give a folder",
    ),
    command(
        "a plan of a family there is not",
        "plan",
        "--gpu h100-80g model.config.model_type=lama",
        "did you mean llama?",
    ),
)

CHECKS = (
    command("a check of a bad config", "check", "train.stepz=3", "did you mean train.steps"),
    command(
        "a check of documents that are not there",
        "check",
        "data.source=./no.jsonl",
        "no.jsonl",
        "there is no such file",
    ),
    command(
        "a check of a tokenizer that is not there",
        "check",
        "data.tokenizer=./nowhere",
        "./nowhere",
    ),
    command(
        "a check of a model that is not there",
        "check",
        "model.name=./nowhere model.config={}",
        "./nowhere",
    ),
    command(
        "a check of a vocabulary too small",
        "check",
        "model.config.vocab_size=99",
        "the tokenizer has 259 tokens and the model embeds 99",
    ),
    command("a verification of a bad config", "verify", "train.stepz=3", "did you mean train.steps"),
    command(
        "a verification of a model that is not there",
        "verify",
        "model.name=./nowhere model.config={}",
        "model.name='./nowhere'",
        "Give a folder",
    ),
    command(
        "a verification of a family there is not",
        "verify",
        "model.config.model_type=lama",
        "did you mean llama?",
    ),
)


@parametrized((*WORDS, *PROCESSES, *PLOTS, *PLANS, *CHECKS))
def test_a_bad_command_line_gets_a_way_out(
    case: Case,
    place_of_all: tuple[Workshop, dict[str, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check(case, Place(tmp_path, *place_of_all), capsys)
