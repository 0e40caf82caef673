"""The events of the topics documents and interactions: what is published to be learned."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from perennial.streams.events.fields import (
    FROZEN,
    MAX_TEXT_BYTES,
    PERMANENT,
    Adapter,
    Ids,
    OutsideEvent,
    OutsideId,
    OutsideName,
    Rating,
    RetentionClass,
    Subjects,
    Text,
    Time,
)

MAX_TURNS = 64
"""Most turns of a conversation, the system prompt and the answer included."""
MAX_TURNS_BYTES = 2 * MAX_TEXT_BYTES
"""Most bytes of all turns together, in UTF-8: as many as a prompt and a response may have."""

Role = Literal["system", "user", "assistant"]


class Turn(BaseModel):
    """One turn of a conversation."""

    model_config = FROZEN
    role: Role
    content: Text


class Message(Turn):
    """One turn of a conversation as people publish it: an unknown field is an error."""

    model_config = ConfigDict(**FROZEN, extra="forbid")


def check_history(turns: list[Turn]) -> list[Turn]:
    """Return the turns before a prompt unchanged.

    Raises:
        ValueError: They are not a system turn, if any, and pairs of a user turn and its answer, or they are too large.
    """
    _check_order([turn.role for turn in turns])
    if turns and turns[-1].role == "user":
        raise ValueError("the turns before a prompt end with an answer of the assistant or with the system turn")
    _check_size(turns)
    return turns


def _check_messages(messages: list[Message]) -> list[Message]:
    roles = [message.role for message in messages]
    _check_order(roles)
    if roles[-2:] != ["user", "assistant"]:
        raise ValueError("a conversation ends with a user turn and the assistant turn that is rated or corrected")
    _check_size(messages)
    return messages


def _check_order(roles: list[Role]) -> None:
    if "system" in roles[1:]:
        raise ValueError("only the first turn may have the role system")
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if spoken[:1] == ["assistant"]:
        raise ValueError("the first turn after the system turn, if any, has the role user")
    if any(one == other for one, other in pairwise(spoken)):
        raise ValueError("user and assistant take turns: no two turns in a row have the same role")


def _check_size(turns: list[Turn] | list[Message]) -> None:
    size = sum(len(turn.content.encode()) for turn in turns)
    if size > MAX_TURNS_BYTES:
        raise ValueError(f"the turns have {size} bytes, at most {MAX_TURNS_BYTES} are allowed")


def is_none(value: object) -> bool:
    """Return True for None: a field that was added later is left out of the JSON where it is not given.

    So events and micro-batches without it keep their bytes, and with them their ids.
    """
    return value is None


class DocumentObserved(OutsideEvent):
    """A document that the adapter must learn."""

    type: ClassVar[str] = "document.observed"
    topic: ClassVar[str] = "documents"
    adapter: Adapter
    """Adapter that learns the document, for example `acme/support`."""
    document_id: OutsideId
    """Id of the document; the same id with another text is a new version of the document."""
    text: Text
    """The text to learn, at most 256 KiB in UTF-8."""
    source: OutsideName | None = None
    """Where the document comes from; documents of one source can supersede each other and be forgotten together."""
    domain: OutsideName | None = None
    """Subject area; stored with the example."""
    subjects: Subjects = Field(default_factory=list)
    """Ids of the persons whom the document is about; all documents about a person can be forgotten together."""
    retention_class: RetentionClass = PERMANENT
    """`permanent`, or how long to keep the document, as an ISO 8601 duration such as `P30D`."""
    expires_at: Time | None = None
    """When to forget the document; the earlier of this and the retention class counts."""
    supersedes: Ids = Field(default_factory=list)
    """Ids of documents and interactions of the same source that this one replaces; they are forgotten. A document without
    a source replaces those that have none."""
    observed_at: Time | None = None
    """When the document was written or seen."""

    def key(self) -> str:
        return f"{self.adapter}|{self.document_id}"


class InteractionObserved(OutsideEvent):
    """An exchange between a user and the model, with a correction or a rating by people.

    It has either `prompt` and `response`, or `messages`: a conversation of several turns.
    """

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["prompt", "response"]}, {"required": ["messages"]}]}
    )
    type: ClassVar[str] = "interaction.observed"
    topic: ClassVar[str] = "interactions"
    adapter: Adapter
    """Adapter that answered."""
    interaction_id: OutsideId
    """Id of the interaction."""
    prompt: Text | None = Field(default=None, exclude_if=is_none)
    """What the user wrote."""
    response: Text | None = Field(default=None, exclude_if=is_none)
    """What the model answered."""
    messages: (
        Annotated[list[Message], Field(min_length=2, max_length=MAX_TURNS), AfterValidator(_check_messages)] | None
    ) = Field(default=None, exclude_if=is_none)
    """The whole conversation instead of prompt and response, oldest turn first: a system turn, if any, then user and
    assistant in turns. The last turn is the assistant's: it is what the rating is about and the correction replaces."""
    correction: Text | None = None
    """The answer that the adapter must learn instead."""
    rating: Rating | None = None
    """How good the response was, from -1 to 1; watched for drift."""
    source: OutsideName | None = None
    """Who corrected or rated the answer, such as a desk or a tool; all that a source taught can be forgotten together, and
    sources that contradict each other have one vote each."""
    subjects: Subjects = Field(default_factory=list)
    """Ids of the persons whom the interaction is about."""
    retention_class: RetentionClass = PERMANENT
    """`permanent`, or how long to keep the interaction, as an ISO 8601 duration such as `P30D`."""
    expires_at: Time | None = None
    """When to forget the interaction; the earlier of this and the retention class counts."""
    observed_at: Time | None = None
    """When the interaction took place."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        pair = {"prompt": self.prompt, "response": self.response}
        if self.messages is None:
            missing = [name for name, text in pair.items() if text is None]
            if missing:
                raise _error(self, "missing", *missing)
        elif any(text is not None for text in pair.values()):
            raise _error(self, _TWO_FORMS, "messages")
        return self

    def key(self) -> str:
        return f"{self.adapter}|{self.interaction_id}"


_TWO_FORMS = PydanticCustomError("two_forms", "either prompt and response, or messages, not both")


def _error(event: InteractionObserved, kind: str | PydanticCustomError, *names: str) -> ValidationError:
    given = event.model_dump()
    errors = [InitErrorDetails(type=kind, loc=(name,), input=given.get(name, given)) for name in names]
    return ValidationError.from_exception_data(type(event).__name__, errors)
