"""Which characters of a rendered conversation the assistant wrote."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatError(ValueError):
    """A conversation that the chat template cannot render, or whose assistant turns cannot be told."""


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template and finds the assistant's share.

    A template with `{% generation %}` marks says itself what is learned. For the others each turn's
    place is found by rendering the conversation up to it, with and without its answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises:
        ValueError: The tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template, which `messages` need; take the tokenizer of an "
                "instruction-tuned model (data.tokenizer), or give `prompt` and `completion` instead."
            )
        self._template = tokenizer.get_chat_template()
        self._specials = dict(tokenizer.special_tokens_map)
        self._eos = tokenizer.eos_token or ""
        self._marked = _GENERATION_MARK.search(self._template) is not None

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> tuple[str, list[Span]]:
        """The conversation as text, and the character spans that the assistant wrote.

        Raises:
            ChatError: The template refuses the conversation, or changes earlier turns in a way that
                hides where an answer begins or ends.
        """
        text, marked = self._apply(messages, tools, mark=self._marked)
        if self._marked:
            return text, [self._with_turn_end(text, span) for span in marked]
        return text, [
            self._turn(text, messages, i, tools)
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    def _with_turn_end(self, text: str, span: Span) -> Span:
        """Marks often stop before the end-of-turn token, without which a model never learns to stop."""
        start, stop = span
        return (start, stop + len(self._eos)) if text.startswith(self._eos, stop) else span

    def _turn(self, text: str, messages: list[dict[str, Any]], i: int, tools: list[Any] | None) -> Span:
        before, _ = self._apply(messages[:i], tools) if i else ("", [])
        prompt, _ = self._apply(messages[:i], tools, prompt=True)
        start = _common_length(prompt, text)
        # A prompt may end in more than the finished turn has, an opening <think> for example.
        if start < len(before) or not text.startswith(before):
            raise ChatError(
                f"the chat template renders what comes before message {i} (from 0) differently once the "
                "answer follows, so that the answer's beginning cannot be told; " + _WAY_OUT
            )
        through, _ = self._apply(messages[: i + 1], tools)
        if text.startswith(through):
            return start, len(through)
        return start, self._end_of_earlier_turn(text, through, messages[i], start, i)

    def _end_of_earlier_turn(
        self, text: str, through: str, message: dict[str, Any], start: int, i: int
    ) -> int:
        """The end of a turn that is rendered differently once others follow.

        Templates of reasoning models drop the thoughts of earlier turns, but close them alike.
        """
        content = message.get("content")
        answer = content.split("</think>")[-1].strip() if isinstance(content, str) else ""
        at = through.rfind(answer) if answer else -1
        closing = through[at + len(answer) :] if at >= 0 else ""
        answer_at = text.find(answer, start) if closing.strip() else -1
        if answer_at < 0 or not text.startswith(closing, answer_at + len(answer)):
            raise ChatError(
                f"the chat template renders message {i} (from 0) differently once others follow, so that "
                "the answer's end cannot be told; " + _WAY_OUT
            )
        return answer_at + len(answer) + len(closing)

    def _apply(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        *,
        prompt: bool = False,
        mark: bool = False,
    ) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._template,
                return_assistant_tokens_mask=mark,
                add_generation_prompt=prompt,
                **self._specials,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise ChatError(f"the chat template cannot render it: {error}") from error
        return texts[0], [(start, stop) for start, stop in spans[0]] if mark else []


def _common_length(one: str, other: str) -> int:
    """Characters that two strings have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    if other.startswith(one[:high]):
        return high
    # By halves: a comparison of slices is a thousand times as fast as one of characters.
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


_WAY_OUT = (
    "mark the assistant's part with {% generation %} in the template, or make each answer a row of its own."
)
