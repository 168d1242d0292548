"""What the README tells people to type works as it is written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longseq.launch.config_file import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python|sh)\n(.*?)```", README, flags=re.DOTALL)


def commands(language: str) -> list[str]:
    """Lines of the blocks of a language, without comments and `$`."""
    lines = [line for found, block in BLOCKS if found == language for line in block.splitlines()]
    stripped = [line.split("  #")[0].strip().removeprefix("$ ") for line in lines]
    return [line for line in stripped if line and not line.startswith("#")]


SHORTER = "train.steps=36 train.eval_every=18 checkpoint.every=18"
"""For `make train`, as it says to be told: two fifths of the steps, which learn enough to be seen."""


@pytest.mark.slow  # trains the default preset as a user does, and prepares and exports: most of a minute
def test_the_commands_run_in_their_order(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    # `make` uses the environment that runs this test; setting one up is what .ci/run does.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "VENV": "", "ARGS": SHORTER, "PATH": path}
    ran = []
    for command in commands("bash"):
        if command == "make test":
            continue  # that is this
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        ran.append(command)
    assert "make train" in ran
    assert (tmp_path / "runs/tiny-cpu/loss.png").is_file()
    check_the_run(tmp_path)


def check_the_run(folder: Path) -> None:
    """Training taught something, and what was exported is what was trained."""
    from transformers import AutoModelForCausalLM

    from longseq.launch.metrics import read_metrics

    records = read_metrics(folder / "runs/tiny-cpu")
    entropy = next(r["value"] for r in records if r["kind"] == "reference")
    held_out = [r["eval_loss"] for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [18, 36]
    assert held_out[-1] < entropy - 0.1
    model = AutoModelForCausalLM.from_pretrained(folder / "runs/tiny-cpu/model")
    assert model.num_parameters() > 2_000_000


def test_commands_for_gpus_are_valid_configs() -> None:
    found = [shlex.split(command) for command in commands("sh") if command.startswith("longseq train")]
    assert found
    for words in found:
        load_config(words[2], [word for word in words[3:] if "=" in word and not word.startswith("-")])


def test_the_plan_that_is_shown_is_what_is_printed(tmp_path: Path) -> None:
    [command] = [command for command in commands("sh") if command.startswith("longseq plan")]
    [shown] = re.findall(r"```\n(meta-llama.*?)```", README, flags=re.DOTALL)
    words = [sys.executable, "-m", "longseq.launch.cli", *shlex.split(command)[1:]]
    # Without rates that somebody has measured here.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LONGSEQ_CACHE": str(tmp_path)}
    printed = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    plan = [line for line in printed.splitlines() if not line.startswith("note: ")]
    assert shown.splitlines() == plan[:3]


@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_python_is_python_that_runs(code: str) -> None:
    exec(compile(PRELUDE + code, "README.md", "exec"), {"__name__": "__main__"})


PRELUDE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50))
input_ids = labels = torch.randint(0, 50, (1, 64))
hidden, head = torch.randn(1, 64, 32), model.lm_head
"""


def test_links_lead_somewhere() -> None:
    for text in (README, *((ROOT / "docs" / name).read_text() for name in os.listdir(ROOT / "docs"))):
        base = ROOT if text is README else ROOT / "docs"
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (base / target).exists(), target
