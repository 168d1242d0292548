"""Writing a figure: the kinds of image that are known, and never half of one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")


def refuse_other_formats(path: Path) -> None:
    """To be asked before anything is worked out that is to be drawn.

    Raises:
        ValueError: The name ends in no kind of image that is known.
    """
    if path.suffix.lstrip(".").lower() not in FORMATS:
        raise ValueError(f"{path}: unknown kind of image; let the name end in .{', .'.join(FORMATS)}.")


def save(figure: Figure, path: Path) -> None:
    """Write a figure under its name at once; folders are made.

    Raises:
        OSError: It cannot be written there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format=path.suffix.lstrip(".").lower())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(f"{path} cannot be written ({reason}); name another place.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
