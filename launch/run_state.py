"""Where a run is, as a checkpoint keeps it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .manifest import HAS_MANIFEST, STATE_FILE, read_json

AWAY = "move the checkpoint away to go on from the one before it."


@dataclass(frozen=True)
class RunState:
    """Where a run is, and over what it is spread. The data's cursor is the number of sequences taken.

    Steps that were skipped, because loss or gradient was not finite, count as steps; `nonfinite_in_a_row` are
    those just before this state.
    """

    step: int = 0
    sequences_seen: int = 0
    tokens_seen: int = 0
    world_size: int = 1
    ulysses_degree: int = 1
    zero_stage: int = 0
    data_digest: str = ""
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0

    def after_step(self, sequences: int, tokens: int) -> RunState:
        """The state one optimizer step later."""
        return replace(
            self,
            step=self.step + 1,
            sequences_seen=self.sequences_seen + sequences,
            tokens_seen=self.tokens_seen + tokens,
        )

    def as_json(self) -> str:
        """As `read_state` reads it."""
        return json.dumps({**asdict(self), HAS_MANIFEST: True}, indent=2)

    @property
    def layout(self) -> str:
        """Over what it is spread, in words."""
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        return f"{processes}, ulysses_degree {self.ulysses_degree}, zero_stage {self.zero_stage}"


def read_state(folder: Path) -> RunState:
    """The state of a checkpoint.

    Raises:
        ValueError: The folder is no checkpoint, or another version's.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} is no checkpoint (it has no {STATE_FILE}); give a folder such as "
            "RUN/checkpoints/step-00000100."
        )
    try:
        tree = read_json(path)
        tree.pop(HAS_MANIFEST, None)
        unknown = tree.keys() - RunState.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(f"it has {', '.join(sorted(unknown))}, unknown to this version")
        return RunState(**tree)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; {AWAY}") from error


def random_state() -> dict[str, torch.Tensor]:
    """The state of this process's generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Bring the generators back."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
