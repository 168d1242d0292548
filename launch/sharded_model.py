"""A Hugging Face model whose weights are sharded from the start, as ZeRO-3 keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..distributed.zero_init import born_sharded, is_sharded, load_sharded, rewritten

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_FREQUENCIES = r"rotary_emb\.inv_freq$"
"""Once saved with Llamas, and computed since."""


def random_sharded_model(
    architecture: Any, device: torch.device, dtype: torch.dtype, zero: Mapping[str, Any]
) -> nn.Module:
    """Random weights, the same as of a model that is not sharded: every rank draws all, and keeps its part.

    Args:
        architecture: Hugging Face config.
        device: Where weights are made.
        dtype: Of the weights.
        zero: DeepSpeed's configuration.
    """
    with born_sharded(zero), _whole_while_initialised(), torch.device(device):
        return _from_config(architecture, dtype)


def load_sharded_model(
    name: str, architecture: Any, device: torch.device, dtype: torch.dtype, zero: Mapping[str, Any]
) -> nn.Module:
    """The weights of a checkpoint, read one after the other.

    Args:
        name: Folder, or name of a Hugging Face repository.
        architecture: Its config.
        device: Where weights are gathered.
        dtype: Of the weights, whatever the checkpoint's is.
        zero: DeepSpeed's configuration.

    Raises:
        ValueError: The checkpoint has no safetensors, or they are of another model.
    """
    from transformers import GenerationConfig
    from transformers.initialization import no_init_weights

    files = safetensors_of(name)
    with born_sharded(zero), no_init_weights(), torch.device(device):
        model = _from_config(architecture, dtype)
    # no_init_weights leaves out tying too.
    model.tie_weights()
    ignored = [OLD_FREQUENCIES, *(model._keys_to_ignore_on_load_unexpected or ())]
    load_sharded(model, files, source=name, ignored=ignored)
    with suppress(OSError):  # where there is none, that of the config stays, as with from_pretrained
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval()


def safetensors_of(name: str) -> list[Path]:
    """The files of a checkpoint's weights, downloaded where they are not here.

    Raises:
        ValueError: There are none, or not all.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    quietly = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, INDEX, **quietly)
    if index is not None:
        try:
            shards, _ = get_checkpoint_shard_files(name, index)
        except OSError as error:
            raise ValueError(f"model.name={name!r}: {error}") from error
        files = [Path(shard) for shard in shards]
        lost = [file.name for file in files if not file.is_file()]
        if lost:
            raise ValueError(
                f"model.name={name!r} has no {', '.join(lost)}, which its {INDEX} names; copy or download "
                "the checkpoint again."
            )
        return files
    single = cached_file(name, WEIGHTS, **quietly)
    if single is None:
        raise ValueError(
            f"model.name={name!r} has no safetensors ({WEIGHTS} or {INDEX}), and parallel.zero_stage=3 reads "
            "weights one by one, which pickles (pytorch_model.bin) do not allow. Load it once with "
            "transformers and save it with save_pretrained, or set parallel.zero_stage=2."
        )
    return [Path(single)]


def _from_config(architecture: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(architecture, dtype=dtype, attn_implementation="eager")


@contextmanager
def _whole_while_initialised() -> Iterator[None]:
    """Let transformers' initialisation of each module see its weights whole.

    It runs at the end of each model's constructor, among the draws of the modules' own: after them all, other
    numbers would be drawn. For as long as this lasts the class's method is another one, as all modules' are
    under DeepSpeed's own context.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel._initialize_weights

    def initialise(model: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        own = [param for param in module.parameters(recurse=False) if is_sharded(param)]
        if getattr(module, "_is_hf_initialized", False) or not own:
            original(model, module, *args, **kwargs)
            return
        with rewritten(own):
            original(model, module, *args, **kwargs)

    PreTrainedModel._initialize_weights = initialise
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = original
