"""Whole runs that take a second: a Llama of 20 thousand weights on a few kilobytes of text.

As a script it is one process of several: `python tiny_run.py A.yaml B.yaml` joins the others by torchrun's
environment variables and trains one config after the other.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from longseq.distributed.groups import ProcessGroups
from longseq.distributed.state_files import SavedState
from longseq.launch import train as train_module
from longseq.launch.checkpoint import RunState, newest_checkpoint, read_state
from longseq.launch.config import RunConfig
from longseq.launch.config_file import dump_config, load_config
from longseq.launch.metrics import MetricsWriter, StepMetrics, read_metrics
from longseq.launch.processes import free_port

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "brew")

TINY = """
model:
  config:
    model_type: llama
    hidden_size: 32
    intermediate_size: 56
    num_hidden_layers: 2
    num_attention_heads: 4
    num_key_value_heads: 2
    vocab_size: 260
    max_position_embeddings: 256
    tie_word_embeddings: true
data: {source: docs.jsonl, eval_source: held_out.jsonl, tokenizer: bytes, num_workers: 1}
sequence: {length: 128}
# An epsilon this large keeps Adam from blowing a gradient's rounding up to a whole step of the weight.
optimizer: {lr: 1e-2, eps: 1e-4, weight_decay: 0.1}
schedule: {name: constant}
train: {steps: 4, global_batch_sequences: 2, precision: float32, eval_sequences: 64}
checkpoint: {at_first_step: false}
log: {tensorboard: false}
"""


class Workshop:
    """A folder with documents and configs, and the runs that are made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_documents(folder / "docs.jsonl", 24, seed=1)
        write_documents(folder / "held_out.jsonl", 7, seed=2)

    def yaml(self, name: str, *overrides: str) -> Path:
        """A config file whose run goes into the folder `name`."""
        base = self.folder / "tiny.yaml"
        base.write_text(TINY)
        places = [
            f"data.source={self.folder / 'docs.jsonl'}",
            f"data.eval_source={self.folder / 'held_out.jsonl'}",
            f"log.run_dir={self.folder / name}",
        ]
        path = self.folder / f"{name}.yaml"
        path.write_text(dump_config(load_config(str(base), [*places, *overrides])))
        return path

    def config(self, name: str, *overrides: str) -> RunConfig:
        """The config of a run in the folder `name`."""
        return load_config(str(self.yaml(name, *overrides)))

    def run(self, name: str, *overrides: str) -> Path:
        """Train in this process; the run's folder."""
        train_here(self.config(name, *overrides))
        return self.folder / name


def write_documents(path: Path, count: int, *, seed: int) -> None:
    """JSONL of `count` texts, each shorter than a sequence."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 18))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def train_here(config: RunConfig) -> RunState:
    """Train in this process, alone, on the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine the threads of a small matrix wait for each other
    try:
        return train_module.train(config, ProcessGroups(), torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)


class Killed(BaseException):
    """Ends a run where a crash would: nothing of the library catches it."""


@contextmanager
def at_step(step: int, act: Callable[[], Any]) -> Iterator[None]:
    """Call `act` once step `step` is done and written down, before its checkpoint is."""
    original = MetricsWriter.step

    def hooked(self: MetricsWriter, metrics: StepMetrics) -> None:
        original(self, metrics)
        if metrics.step == step:
            act()

    MetricsWriter.step = hooked
    try:
        yield
    finally:
        MetricsWriter.step = original


def kill() -> None:
    """For `at_step`."""
    raise Killed


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind."""
    return [record for record in read_metrics(run_dir) if record["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    """The loss of each step; the steps must be 1, 2, 3, ..., each once."""
    steps = records(run_dir, "step")
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    return [step["loss"] for step in steps]


def weights(run_dir: Path) -> dict[str, Tensor]:
    """The trained weights of a run's newest checkpoint, whatever engine wrote it."""
    newest = newest_checkpoint(run_dir)
    if read_state(newest).zero_stage == 0:
        return load_file(newest / "engine" / "model.safetensors")
    found = dict(SavedState(newest / "engine").weights())
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if head is not None and embedding is not None and torch.equal(head, embedding):
        del found["lm_head.weight"]  # tied weights have two names there
    return found


def assert_same_run(ours: Path, truth: Path, *, relative: float, absolute: float) -> None:
    """Two runs agree: losses and eval to `relative`, weights to `absolute`, tokens and epochs exactly."""
    assert_close(losses(ours), losses(truth), relative)
    evals = [records(run, "eval")[-1] for run in (ours, truth)]
    assert_close([evals[0]["eval_loss"]], [evals[1]["eval_loss"]], relative)
    assert evals[0]["eval_tokens"] == evals[1]["eval_tokens"]
    _assert_same_place(ours, truth)
    mine, theirs = weights(ours), weights(truth)
    assert mine.keys() == theirs.keys()
    off = {name: float((mine[name].float() - theirs[name].float()).abs().max()) for name in mine}
    assert max(off.values()) <= absolute, off


def assert_equal_runs(ours: Path, truth: Path) -> None:
    """Two runs agree in every bit of losses and weights, and each step is there once."""
    assert losses(ours) == losses(truth)
    _assert_same_place(ours, truth)
    evals = [
        [(record["step"], record["eval_loss"]) for record in records(run, "eval")] for run in (ours, truth)
    ]
    assert evals[0] == evals[1]
    mine, theirs = weights(ours), weights(truth)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def _assert_same_place(ours: Path, truth: Path) -> None:
    for key in ("tokens", "tokens_seen", "epoch", "lr"):
        assert [r[key] for r in records(ours, "step")] == [r[key] for r in records(truth, "step")], key


def checkpoint_names(run_dir: Path) -> list[str]:
    """What is in the folder of the checkpoints, hidden or not, beside the pointer to the newest."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.name != "latest")


def forget_manifest(checkpoint: Path) -> None:
    """Make a checkpoint what versions wrote that knew no manifest."""
    (checkpoint / "manifest.json").unlink()
    state = json.loads((checkpoint / "state.json").read_text())
    del state["manifest"]
    (checkpoint / "state.json").write_text(json.dumps(state))


def held_out_loss(model_dir: Path, documents: Path, dtype: torch.dtype = torch.float32) -> tuple[float, int]:
    """Mean loss of an exported model on each document by itself, and the tokens: transformers' code alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
    total, count = 0.0, 0
    for line in documents.read_text().splitlines():
        text = tokenizer.bos_token + json.loads(line)["text"] + tokenizer.eos_token
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.numel() - 1)
        count += ids.numel() - 1
    return total / count, count


def assert_close(ours: list[float], truth: list[float], relative: float) -> None:
    """Equal to a relative bound, place by place."""
    assert len(ours) == len(truth)
    off = [abs(a - b) / abs(b) for a, b in zip(ours, truth, strict=True)]
    assert max(off) <= relative, f"off by {max(off):.1e}: {ours} is not {truth}"


def environment(**more: str) -> dict[str, str]:
    """For a process of ours: one thread, no hub, nothing of a launcher's that started the tests."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def train_on_two(yamls: Iterable[Path]) -> str:
    """Train configs, one after the other, on two processes of the CPU; what they printed."""
    command = [sys.executable, __file__, *map(str, yamls)]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            command,
            env=environment(**group, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(printed)
    return printed[0]


def _one_of_several(yamls: list[str]) -> None:
    from longseq.launch.processes import join, leave, set_up_logging

    configs = [load_config(path) for path in yamls]
    # DeepSpeed must hear of the process group before the first run that uses it.
    _, groups, device = join(max(configs, key=lambda config: config.parallel.zero_stage))
    set_up_logging(groups.is_main)
    for config in configs:
        train_module.train(config, ProcessGroups.create(config.parallel.ulysses_degree), device)
    leave()


if __name__ == "__main__":
    _one_of_several(sys.argv[1:])
