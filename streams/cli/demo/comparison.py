"""Train the model that forgetting is compared with: one that never saw the forgotten documents."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.objects.object_store import put_blob
from perennial.streams.events.models import Batch
from perennial.streams.settings import Settings


def train_without(
    settings: Settings,
    folder: Path,
    cuts: Sequence[Batch],
    forgotten: Collection[str],
    on_progress: Callable[[float], None],
) -> tuple[bytes, bool]:
    """Train an adapter from scratch on micro-batches without some documents, without any code of forgetting.

    Args:
        settings: Settings of the stack.
        folder: Folder for the micro-batches as they are without the documents.
        cuts: Micro-batches of one adapter in the order in which it learned them.
        forgotten: Ids of the documents to leave out.
        on_progress: Called with the share that is done.

    Returns:
        The weights as safetensors, and whether this device computes the same bits again.
    """
    from perennial.learner.model.base import load_base
    from perennial.learner.model.lora import to_safetensors
    from perennial.learner.training.state import TrainingState
    from perennial.learner.versions.micro_batches import BatchRows
    from perennial.learner.versions.version_writer import make_version_writer

    store = DirectoryStore(folder)
    base = load_base(settings.model.base, settings.model.device, settings.model.threads, settings.model.dtype)
    updater = make_version_writer(settings, store, base).updater
    rows = BatchRows(store, updater.rows)
    adapter = cuts[0].adapter
    state = TrainingState(updater.lora.initial_weights(adapter, updater.recipe.seed))
    for number, cut in enumerate(cuts, start=1):
        examples = [example for example in cut.examples if example.document_id not in forgotten]
        if examples:
            body = Batch(adapter=adapter, cut=cut.cut, examples=examples, skipped=[]).model_dump_json(by_alias=True)
            digest = put_blob(store, body.encode())
            found = updater.update(state, examples, adapter=adapter, cut=cut.cut, batch=digest, replayed=rows)
            if found.outcome == "promoted":
                state = found.state
        on_progress(number / len(cuts))
    return to_safetensors(state.weights), base.device.type == "cpu"
