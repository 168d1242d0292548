"""Which checkpoint a run goes on from, where nodes do not see the same ones yet."""

from __future__ import annotations

from pathlib import Path

import pytest
from gloo import run_cases

from longseq.distributed import ProcessGroups
from longseq.launch.checkpoint import Checkpoints
from longseq.launch.config_file import parse_config
from longseq.launch.resume import choose_checkpoint

# Slow: two processes are started.
pytestmark = pytest.mark.slow


def resume_case(run_dirs: list[str], resume: str) -> str:
    """What a rank goes on from, or hears, whose node sees a folder of its own."""
    groups = ProcessGroups.create()
    run_dir = run_dirs[groups.rank]
    config = parse_config(
        {
            "model": {"config": {"model_type": "llama"}},
            "data": {"tokenizer": "bytes"},
            "checkpoint": {"resume": resume},
            "log": {"run_dir": run_dir},
        }
    )
    try:
        return str(choose_checkpoint(config, Checkpoints(Path(run_dir), groups, keep=2), groups))
    except ValueError as error:
        return str(error)


def test_nodes_that_see_different_checkpoints_stop_alike(tmp_path: Path) -> None:
    for node, steps in (("late", (10,)), ("early", (10, 20)), ("new", ())):
        (tmp_path / node / "checkpoints").mkdir(parents=True)
        for step in steps:
            folder = tmp_path / node / "checkpoints" / f"step-{step:08d}"
            folder.mkdir()
            (folder / "state.json").write_text(f'{{"step": {step}}}')
    early, late, new = (str(tmp_path / node) for node in ("early", "late", "new"))
    found = run_cases(
        2,
        {
            "auto": (resume_case, {"run_dirs": [early, late], "resume": "auto"}),
            "never": (resume_case, {"run_dirs": [early, new], "resume": "never"}),
            "named": (resume_case, {"run_dirs": [new, new], "resume": early}),
            "same": (resume_case, {"run_dirs": [early, early], "resume": "auto"}),
        },
    )
    for said in found["auto"]:
        assert "step-00000010 on rank 1" in said
        assert "step-00000020 on rank 0" in said
    for said in found["never"]:  # and no rank waits for one that has raised
        assert "None on rank 1" in said
    assert found["named"] == found["same"] == [f"{early}/checkpoints/step-00000020"] * 2
