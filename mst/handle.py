"""What mini-sequences change on a model, and the way back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from ..distributed.zero import gather_whole
from .families import CausalLMParts

logger = logging.getLogger(__name__)

_MISSING = object()


class MiniSequenceHandle:
    """What was changed on a model, and the way back."""

    def __init__(self, parts: CausalLMParts) -> None:
        self._parts = parts
        self._patched: list[tuple[nn.Module, Any]] = []
        self._let_go: list[Callable[[], None]] = []
        self._switched_off: list[nn.Module] = []
        self._said = False
        parts.causal_lm._mini_sequence_handle = self

    def patch(self, module: nn.Module, forward: Callable) -> None:
        """Give one instance another forward, remembering an earlier patch of somebody else's."""
        self._patched.append((module, module.__dict__.get("forward", _MISSING)))
        module.forward = forward

    def patch_tiled(self, module: nn.Module, forward: Callable) -> None:
        """Patch a module that calls its children once a tile."""
        self.patch(module, forward)
        self._let_go.append(gather_whole(module))

    def leave_checkpoints_to_layers(self) -> None:
        """Switch transformers' own layer checkpoints off: a streamed layer inside one would run thrice."""
        for layer in self._parts.layers:
            if getattr(layer, "gradient_checkpointing", False):
                layer.gradient_checkpointing = False
                self._switched_off.append(layer)
        if self._switched_off and not self._said:
            logger.info("gradient checkpointing is left to the streamed layers, which do it themselves.")
            self._said = True

    def give_checkpoints_back(self) -> None:
        """Switch them on again: for layers that run as transformers wrote them, and for good."""
        for layer in self._switched_off:
            layer.gradient_checkpointing = True
        self._switched_off.clear()

    def __deepcopy__(self, memo: dict) -> MiniSequenceHandle:
        # The copy's patched forwards would go on computing with this model's weights.
        raise ValueError(
            "a model with mini-sequences cannot be copied; copy it before, or call handle.undo() first."
        )

    def undo(self) -> None:
        """Give the model back as it was; a second call does nothing."""
        for module, earlier in reversed(self._patched):
            if earlier is _MISSING:
                del module.forward
            else:
                module.forward = earlier
        self._patched.clear()
        for let_go in self._let_go:
            let_go()
        self._let_go.clear()
        self.give_checkpoints_back()
        causal_lm = self._parts.causal_lm
        if getattr(causal_lm, "_mini_sequence_handle", None) is self:
            del causal_lm._mini_sequence_handle
