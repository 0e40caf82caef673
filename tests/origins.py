"""Origins of test examples that the broker of a test could have given: roles refuse others."""

from __future__ import annotations

from perennial.storage.objects.factory import open_store
from perennial.streams.events.models import ExampleAccepted, ExampleScored
from perennial.streams.kafka.installation import add_input_topic_id, check_installation, load_installation
from perennial.streams.settings import Settings


def adopt(settings: Settings, event: ExampleAccepted) -> ExampleAccepted:
    """Return the example with this installation's cluster id and topic prefix.

    Its topic id is recorded as one that the input topic had before, so its offset may be any.
    """
    store = open_store(settings.store.require_uri(), settings.s3)
    record = load_installation(store) or check_installation(settings, store, ["documents", "interactions"])
    name = event.origin.topic
    if event.origin.topic_id not in record.known_topic_ids(name):
        add_input_topic_id(store, name, event.origin.topic_id)
    origin = event.origin.model_copy(
        update={"cluster_id": record.cluster_id, "topic": settings.kafka.topic(name)},
    )
    return event.model_copy(update={"origin": origin})


def adopt_scored(settings: Settings, event: ExampleScored) -> ExampleScored:
    """Return the scored example with an origin as `adopt` gives it."""
    return event.model_copy(update={"example": adopt(settings, event.example)})
