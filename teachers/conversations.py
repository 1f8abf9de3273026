"""Conversations as the teacher's chat template writes them, and which of it the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from shearling import ShearlingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = tuple[str, str]
"""Role and content."""

# Templates of Llama 3 write today's date where none is given, and what is made or measured with the
# same settings must be the same tomorrow. This is the day that they themselves fall back on.
_DAY = datetime(2024, 7, 26)

# A macro of the template's own comes before the function of this name that transformers gives it.
_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{part}', '{_DAY:%{part}}')" for part in "aAbBdHIjmMpSyY")
    + " }}{% endmacro %}\n"
)


def same_every_day(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Arguments of `apply_chat_template` with which a template writes one date on all days."""
    return {
        "date_string": f"{_DAY:%d %b %Y}",
        "chat_template": _CLOCK + tokenizer.get_chat_template(),
    }


_WORD = "\ue000"
"""A character of private use, which no template writes itself."""


def read_turns(value: Any, where: str) -> tuple[Turn, ...]:
    """A column's value as turns; none if it, or what one of them says, is null.

    Anything else but a list of {role, content} is told with its place.
    """
    hint = 'A conversation is [{"role": "user", "content": "..."}, ...].'
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ShearlingError(f"{where} holds no list of messages.", hint=hint)
    turns = []
    for number, message in enumerate(value, 1):
        fields = message if isinstance(message, Mapping) else {}
        role, content = fields.get("role"), fields.get("content", 0)
        if not (isinstance(role, str) and isinstance(content, str | None)):
            raise ShearlingError(
                f"{where}: message {number} is no object with a text as `role` and as `content`.",
                hint=hint,
            )
        turns.append((role, content))
    said = [(role, content) for role, content in turns if content is not None]
    return tuple(said) if len(said) == len(turns) else ()


class ChatTemplate:
    """A tokenizer's chat template, with the spans of its text that the assistant writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: object) -> None:
        if not tokenizer.chat_template:
            raise ShearlingError(
                f"The tokenizer in {folder} has no chat template, so it can't write conversations.",
                hint="Use a teacher tuned on instructions, or a source without `messages`.",
            )
        self.tokenizer = tokenizer
        special = [str(token) for token in tokenizer.all_special_tokens]
        special += [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        longest_first = sorted({token for token in special if token}, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def write(self, turns: Sequence[Turn], *, spans: bool) -> tuple[str, list[tuple[int, int]]]:
        """The conversation's text and, if asked for, from where to where the assistant speaks.

        A turn's span holds the token that ends it: to stop is part of the answer. A control token
        that a message spells out gets a space inside, so no message can begin or end a turn.
        """
        messages = [{"role": role, "content": self.disarmed(text)} for role, text in turns]
        text = self._render(messages)
        found = []
        for number, message in enumerate(messages):
            if not spans or message["role"] != "assistant":
                continue
            before = self._render(messages[:number], prompt=True) if number else self._opening()
            through = self._render(messages[: number + 1]).rstrip()
            if not (text.startswith(through) and through.startswith(before)):
                raise ShearlingError(
                    "The teacher's chat template writes earlier turns differently once others "
                    "follow, so the assistant's part can't be told.",
                    hint="Set the source's `loss` to all.",
                )
            found.append((len(before), len(through)))
        return text.rstrip(), found

    def _opening(self) -> str:
        """What stands before the words of an assistant who speaks first: BOS and the header.

        There is no prompt to be asked for: a conversation without any turn is refused.
        """
        return self._render([{"role": "assistant", "content": _WORD}]).partition(_WORD)[0]

    def disarmed(self, text: str) -> str:
        """The text with a space inside each control token that it spells out."""
        return self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def _render(self, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=prompt,
                **same_every_day(self.tokenizer),
            )
        except Exception as error:  # Jinja's own types, and whatever a template raises
            roles = ", ".join(message["role"] for message in messages)
            raise ShearlingError(
                f"The teacher's chat template refuses a conversation of {roles}: {error}",
                hint="Check the column that the source's `messages` names.",
            ) from error
        return str(text)
