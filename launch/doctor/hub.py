"""Whether the model and tokenizer of a config can be had: from a folder, the cache, or the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .findings import Finding, error, ok

if TYPE_CHECKING:
    from ..config import RunConfig

ASK_S = 10.0
Answer = Literal["there", "gated", "unknown", "unreachable", "offline"]


@dataclass(frozen=True)
class Repository:
    """Facts on a model or tokenizer. A token is never part of them.

    Attributes:
        key: That names it.
        name: As it is named.
        folder: Whether it is a folder of this machine.
        missing: Files that the folder lacks.
        cached_at: Folder of the cache that has its config; None where none has.
        weights_cached: Whether its weights are there too.
        answer: What the hub said.
        has_token: Whether the hub was told who asks.
    """

    key: str
    name: str
    folder: bool = False
    missing: tuple[str, ...] = ()
    cached_at: str | None = None
    weights_cached: bool = False
    answer: Answer = "there"
    has_token: bool = False


def read_repositories(config: RunConfig) -> Iterator[Repository]:
    """The facts on what a config names: its model, and its tokenizer where that is another's."""
    for key, name in (("model.name", config.model.name), ("data.tokenizer", config.data.tokenizer)):
        if name is not None and name != "bytes":
            yield read_repository(key, name, wants_weights=key == "model.name")


def read_repository(key: str, name: str, *, wants_weights: bool) -> Repository:
    """The facts; the hub is asked once and for seconds only."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Repository(key, name, folder=True, missing=_missing(folder, wants_weights))
    from huggingface_hub import get_token, try_to_load_from_cache

    def cached(*files: str) -> str | None:
        try:
            found = [try_to_load_from_cache(name, file) for file in files]
        except ValueError:  # no name that a repository can have
            return None
        return next((str(Path(path).parent) for path in found if isinstance(path, str)), None)

    files = ("config.json",) if wants_weights else ("tokenizer.json", "tokenizer_config.json")
    weights = ("model.safetensors", "model.safetensors.index.json")
    return Repository(
        key,
        name,
        cached_at=cached(*files),
        weights_cached=wants_weights and cached(*weights) is not None,
        answer=_ask(name),
        has_token=get_token() is not None,
    )


def _missing(folder: Path, wants_weights: bool) -> tuple[str, ...]:
    if not wants_weights:
        files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
        return () if any((folder / name).is_file() for name in files) else ("tokenizer.json",)
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    return tuple(missing)


def _ask(name: str) -> Answer:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") in ("1", "true"):
        return "offline"
    try:
        api = HfApi()
        if api.model_info(name, timeout=ASK_S).gated:
            api.auth_check(name)
    except GatedRepoError:
        return "gated"
    except (RepositoryNotFoundError, HFValidationError):
        return "unknown"
    except Exception:  # of whatever library carries the request
        return "unreachable"
    return "there"


def check_repository(facts: Repository) -> list[Finding]:
    """One line."""
    line = f"{facts.key}={facts.name}"
    if facts.folder:
        if facts.missing:
            return [
                error(
                    f"{line}: the folder has no {' and no '.join(facts.missing)}",
                    "Name a folder that `longseq export` or save_pretrained wrote.",
                )
            ]
        return [ok(f"{line} is a folder of this machine")]
    where = (
        "cached with its weights" if facts.weights_cached else "cached" if facts.cached_at else "not cached"
    )
    if facts.answer == "there":
        return [ok(f"{line}: the hub has it; {where} here")]
    if facts.cached_at:
        why = {"offline": "HF_HUB_OFFLINE is set", "unreachable": "the hub is out of reach"}
        return [ok(f"{line} is {where} ({why.get(facts.answer, 'the hub refuses it')})")]
    if facts.answer == "gated":
        who = "the token that is there may not read it" if facts.has_token else "no token is there"
        return [
            error(
                f"{line}: the hub asks for permission, and {who}",
                f"Accept its licence on https://huggingface.co/{facts.name}, then log in: hf auth login.",
            )
        ]
    if facts.answer == "unknown":
        private = "" if facts.has_token else " A private one needs a login: hf auth login."
        return [error(f"{line}: the hub knows no such repository", f"Check the name.{private}")]
    if facts.answer == "offline":
        return [
            error(
                f"{line} is not cached, and HF_HUB_OFFLINE forbids to download it",
                f"Unset it, or run `hf download {facts.name}` on a machine with a network and copy HF_HOME.",
            )
        ]
    return [
        error(
            f"{line} is not cached, and the hub is out of reach",
            "Check the network and HTTPS_PROXY, or name a folder of this machine.",
        )
    ]
