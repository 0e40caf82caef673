"""The text that a base's chat template puts around the turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

from perennial.learner.model.encoders import Encoder

Turns: TypeAlias = Sequence[tuple[str, str]]
"""Role (`system`, `user` or `assistant`) and text of each turn, the oldest first; the last one is a user's."""

_TEMPLATE_DATE = datetime(2024, 7, 26, tzinfo=UTC)
"""The date that chat templates get. Llama 3.2's and others put today's date into every turn: what an adapter is
trained on would depend on the day, and a rebuild on another day would not give the same bits. Llama's template falls
back to this date itself."""
_ALL_ROLES = ("system", "user", "assistant", "user")
_PLAIN = {"system": "System: ", "user": "User: ", "assistant": "Assistant: "}


@dataclass(frozen=True)
class ChatFrame:
    """The frame of conversations with the same roles in the same order.

    Attributes:
        texts: The texts in front of each turn, and the one behind the last turn, up to where the answer begins.
        ids: Token ids of each of these texts, each encoded by itself.
        templated: The texts come from the base's chat template.
        trimmed: The template takes the white space around a turn's text away.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    templated: bool = True
    trimmed: bool = False

    @property
    def tokens(self) -> int:
        """Number of token ids of the frame."""
        return sum(map(len, self.ids))


class ChatFrames:
    """Renders a base's chat template around sentinels, once for each order of roles.

    Where the tokenizer has no template, or its template cannot take the roles, the frame is plain text: `System: …`,
    `User: …`, `Assistant: …`.

    Args:
        tokenizer: Tokenizer of the base, as transformers loads it.
        trusted: Encoder for our own text.
        bos: Token id that starts a text.
    """

    def __init__(self, tokenizer: Any, trusted: Encoder, bos: int) -> None:
        self._tokenizer = tokenizer
        self._trusted = trusted
        self._bos = bos
        self._frames: dict[tuple[str, ...], ChatFrame | None] = {}

    def all_ids(self) -> frozenset[int]:
        """Return the token ids that frames of any conversation may have."""
        frames = (self.framed([(role, "") for role in roles])[1] for roles in (_ALL_ROLES, _ALL_ROLES[1:], ("user",)))
        return frozenset(token for frame in frames for piece in frame.ids for token in piece)

    def framed(self, turns: Turns) -> tuple[Turns, ChatFrame]:
        """Return the turns that the template takes, and their frame.

        A template may have no system turn, as Gemma's. The text of the system turn then begins the first user's turn.
        """
        frame = self._of(tuple(role for role, _ in turns))
        if frame is None and turns[0][0] == "system":
            (_, system), (role, first), *rest = turns
            folded = [(role, f"{system}\n\n{first}"), *rest]
            frame = self._of(tuple(role for role, _ in folded))
            turns = turns if frame is None else folded
        return turns, frame or self._plain(turns)

    def _of(self, roles: tuple[str, ...]) -> ChatFrame | None:
        if roles not in self._frames:
            self._frames[roles] = self._render(roles)
        return self._frames[roles]

    def _render(self, roles: tuple[str, ...]) -> ChatFrame | None:
        """Return the frame; None where the template cannot render these roles in this order."""
        if not getattr(self._tokenizer, "chat_template", None):
            return None
        marks = [f"\u2063{number}\u2063" for number in range(len(roles))]
        try:
            rest = self._tokenizer.apply_chat_template(
                [{"role": role, "content": f" {mark} "} for role, mark in zip(roles, marks, strict=True)],
                tokenize=False,
                add_generation_prompt=True,
                strftime_now=_TEMPLATE_DATE.strftime,
            )
        except Exception:  # noqa: BLE001 a template is a program of the base's makers: it may refuse roles with any error
            return None
        texts, trimmed = [], False
        for mark in marks:
            head, found, rest = rest.partition(mark)
            if not found or mark in rest:
                return None
            if head.endswith(" ") and rest.startswith(" "):
                head, rest = head[:-1], rest[1:]
            else:
                trimmed = True
            texts.append(head)
        return self._encoded((*texts, rest), trimmed=trimmed)

    def _plain(self, turns: Turns) -> ChatFrame:
        heads = [_PLAIN[role] for role, _ in turns]
        frame = self._encoded((heads[0], *(f"\n{head}" for head in (*heads[1:], _PLAIN["assistant"]))))
        return ChatFrame(frame.texts, ((self._bos, *frame.ids[0]), *frame.ids[1:]), templated=False)

    def _encoded(self, texts: tuple[str, ...], *, trimmed: bool = False) -> ChatFrame:
        return ChatFrame(texts, tuple(tuple(self._trusted(text)) for text in texts), trimmed=trimmed)
