"""What a run can be asked while it trains: by signals, by files in its folder, and from another machine."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from .nodes import asked_to_stop, heed_requests

SAVE_FILE = "SAVE"
STOP_FILE = "STOP"


@dataclass(frozen=True)
class Wishes:
    """What was asked of a rank, or of all of them together."""

    stop: bool = False
    save: bool = False


class Requests:
    """Requests to save, or to save and stop; looked at between two steps.

    SIGTERM and SIGUSR1, to any process, save and stop: Slurm sends the one it was told before a job's time is
    up, and the other when it is. A file `STOP` in the run's folder does the same, and a file `SAVE` saves and
    goes on; rank 0 looks for them, and removes what it has taken.
    """

    def __init__(self, run_dir: Path, is_main: bool) -> None:
        """Takes the signals until `close`.

        Args:
            run_dir: The run's folder.
            is_main: Whether this rank looks for the files.
        """
        self._signal: str | None = None
        self._save_file, self._stop_file = run_dir / SAVE_FILE, run_dir / STOP_FILE
        self._is_main = is_main
        self._earlier = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)
        }
        heed_requests(True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    @property
    def stop_asked_by(self) -> str | None:
        """The signal that came, here or (on rank 0) to the launcher on another machine, or the file."""
        asked = self._signal or asked_to_stop()
        return asked or (str(self._stop_file) if self._is_main and self._stop_file.exists() else None)

    def wishes(self) -> Wishes:
        """What this rank is asked at the moment."""
        save = self._is_main and self._save_file.exists()
        return Wishes(stop=self.stop_asked_by is not None, save=save)

    def take(self, wishes: Wishes) -> None:
        """Remove the files of what is about to be done, so that it is done once."""
        if not self._is_main:
            return
        if wishes.save or wishes.stop:
            self._save_file.unlink(missing_ok=True)
        if wishes.stop:
            self._stop_file.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the signals back to whom they belonged."""
        heed_requests(False)
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
