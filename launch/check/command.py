"""`longseq check`: a config, what of its data carries loss, and the plan; before anything is computed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import RunConfig
from ..config_changes import with_values
from ..config_file import load_config
from ..data.packing import pack_documents
from ..data.sources import find_sources
from ..data.tokenizer import load_tokenizer, vocabulary_size
from ..doctor.findings import Finding, has_errors, show
from ..doctor.hub import check_repository, read_repositories
from .data import Sample, read_sample
from .loss import look, pieces_of, unusable
from .view import draw_sequence

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from ..planner.plan import Plan

LENGTH = 65536
"""Of the sequence that is shown where the config's is the plan's to choose, and that cannot be made."""

T = TypeVar("T")


def check(config_source: str, overrides: list[str]) -> int:
    """Validate a config, look at the beginning of its data, and plan the run. Nothing is trained or kept.

    Args:
        config_source: Preset or YAML file.
        overrides: `key=value` each.

    Returns:
        Exit status: 0, or 1 where the run would fail or learn nothing.

    Raises:
        ValueError: All that is wrong with config, model, tokenizer and data, at once.
    """
    from ..planner.report import print_plan

    config = load_config(config_source, overrides)
    console = _console()
    console.print(f"config: {config_source} is valid")
    found = _Found(config)
    if found.errors:
        raise ValueError("\n".join(found.errors))
    console.print(f"model: {_describe(config, found.architecture)}")
    findings = _positions(found)
    findings += _show_data(found.config, found.sample, found.tokenizer, console)
    show(sorted(findings, key=lambda finding: finding.verdict != "error"))
    if not findings:
        console.print("data: nothing suspicious")
    plan, notes = found.planned
    print_plan(plan, notes)
    return int(has_errors(findings) or not plan.fits)


class _Found:
    """Everything that a config names, as far as it is to be had, and all that is wrong with it.

    Attributes:
        config: With a number for its length, and folders of the cache in place of a hub that is out of reach.
        architecture: Hugging Face config of the model.
        tokenizer: Of the run.
        planned: The plan, and what to say of it.
        sample: Of the data.
        errors: Where there are any, the others may be missing.
    """

    def __init__(self, config: RunConfig) -> None:
        from ..planner.command import plan_here

        self.errors: list[str] = []
        self.architecture = self.tokenizer = self.planned = self.sample = None
        config = self._in_reach(config)
        data = config.data
        if not self.errors:
            self.architecture = self._try(lambda: _architecture(config))
            self.tokenizer = self._try(lambda: load_tokenizer(data.tokenizer or config.model.name or "bytes"))
        if self.architecture is not None:
            self.planned = self._try(lambda: plan_here(config))
        self.config = _with_length(config, None if self.planned is None else self.planned[0])
        if self.tokenizer is None:
            self._try(lambda: find_sources(data.source, data.split))
            return
        if self.architecture is not None:
            self.errors += _vocabulary(self.architecture, self.tokenizer)
        self.sample = self._try(lambda: read_sample(data, self.tokenizer, self.config.sequence.length))

    def _try(self, work: Callable[[], T]) -> T | None:
        """What it returns; where it cannot, its complaint goes to the others, so that all come at once."""
        try:
            return work()
        except (ValueError, OSError) as error:
            if str(error) not in self.errors:
                self.errors.append(str(error))
            return None

    def _in_reach(self, config: RunConfig) -> RunConfig:
        """Ask for model and tokenizer once, and not again and again where there is no network."""
        for repository in read_repositories(config):
            findings = check_repository(repository)
            self.errors += [finding.text for finding in findings if finding.verdict == "error"]
            if repository.cached_at is not None and repository.answer != "there":
                config = with_values(config, {repository.key: repository.cached_at})
        return config


def _console() -> Console:
    from rich.console import Console

    # A document may hold what the terminal's encoding has not.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False, emoji=False)


def _architecture(config: RunConfig) -> Any:
    from ..model import check_model, hf_config

    check_model(config.model)
    return hf_config(config.model)


def _with_length(config: RunConfig, plan: Plan | None) -> RunConfig:
    """The config with a number for its length: the plan's where it is `max`."""
    if config.sequence.length != "max":
        return config
    return with_values(config, {"sequence.length": LENGTH if plan is None else plan.knobs.length})


def _vocabulary(architecture: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    rows, needed = architecture.vocab_size, vocabulary_size(tokenizer)
    if needed <= rows:
        return []
    return [
        f"the tokenizer has {needed} tokens and the model embeds {rows}; choose the model's own tokenizer "
        "(data.tokenizer) or a larger model.config.vocab_size."
    ]


def _describe(config: RunConfig, architecture: Any) -> str:
    name = config.model.name or "random weights"
    return (
        f"{name}, {architecture.model_type}: {architecture.num_hidden_layers} layers of "
        f"{architecture.hidden_size}, vocabulary of {architecture.vocab_size:,}"
    )


def _positions(found: _Found) -> list[Finding]:
    known = getattr(found.architecture, "max_position_embeddings", None)
    length = found.config.sequence.length
    if known is None or length <= known:
        return []
    return [
        Finding(
            "error",
            f"sequence.length={length:,} is above the {known:,} positions that the model knows, and "
            "`longseq train` refuses it",
            "Shorten it, or raise model.config.max_position_embeddings and scale the rotary embedding "
            "(model.config.rope_parameters), as the preset llama3-8b-512k-8gpu does.",
        )
    ]


def _show_data(
    config: RunConfig, sample: Sample, tokenizer: PreTrainedTokenizerBase, console: Console
) -> list[Finding]:
    """Print what was read and one sequence of it; what is suspicious about it."""
    if not sample.documents:
        return list(unusable(config, sample))
    kinds = ", ".join(dict.fromkeys(sample.kinds))
    extent = "all" if sample.is_whole else "the first"
    console.print(
        f"data: {extent} {len(sample.documents)} documents ({kinds}), {sample.lengths.sum():,} tokens"
    )
    packing = pack_documents(sample.lengths, config.sequence.length, pack=config.data.pack)
    sequences = pieces_of(packing, sample)
    # The one with most documents tells most: the first is often a piece of a long one.
    shown = max(sequences, key=lambda pieces: (any(piece.trained.any() for piece in pieces), len(pieces)))
    trained = sum(int(piece.trained.sum()) for pieces in sequences for piece in pieces)
    total = sum(len(piece.tokens) for pieces in sequences for piece in pieces)
    coloured = console.is_terminal and console.color_system is not None
    how = "green" if coloured else "between ⟦ and ⟧"
    console.print(f"loss: {trained / total:.1%} of the tokens carry loss; in this sequence what is {how}:")
    tokens = sum(len(piece.tokens) for piece in shown)
    padding = 0 if packing.capacity is None else packing.capacity - tokens
    for block in draw_sequence(shown, padding, tokenizer, coloured=coloured):
        console.print(block)
    return list(look(config, sample, packing, sequences, tokenizer))
