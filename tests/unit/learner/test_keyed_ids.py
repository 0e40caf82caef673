"""Versions name examples by keyed ids: everything works with them, with plain ones, and with both; nobody can guess."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from perennial.learner.versions import update_job
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.history.example_ids import ExampleIds, is_keyed, keyed_id
from perennial.storage.registry.history.pages import HistoryPage
from perennial.storage.registry.manifest import Manifest
from perennial.storage.registry.refused_examples import load_refused_examples
from perennial.storage.registry.suppressed_texts import load_text_key, text_key_key
from perennial.streams.cli.adapter_page.adapter_history import UNKNOWN_DOMAIN, adapter_history
from perennial.streams.cli.economics.recorded_updates import held_examples
from perennial.streams.cli.example_counts import count_examples, counted_examples
from perennial.streams.cli.explain import explain_examples
from perennial.streams.cli.forget.preview import show_plan
from perennial.streams.events.cloudevents import decode
from perennial.streams.events.models import ExampleAccepted, Selector
from perennial.streams.intake.validation import Accepted, Acceptor, OriginPartition
from perennial.streams.retain.example_index import ExampleIndex
from tests import jobs, tiny
from tests.local_learner import LocalLearner
from tests.unit.learner.test_forgetting import erase, forget, head, never_saw, quarantined
from tests.unit.learner.test_rebase import rebase
from tests.unit.learner.test_versions import ADAPTER, local_learner

FORMS = ["keyed", "plain", "both"]
PER_CUT = 4
ORIGIN = tiny.origin(0)


def accepted(*numbers: int) -> list[ExampleAccepted]:
    """Return documents as intake accepts them, with the ids that it gives them."""
    partition = OriginPartition(ORIGIN.cluster_id, ORIGIN.topic, ORIGIN.topic_id, ORIGIN.partition, "documents")
    return [guessed(partition, n) for n in numbers]


def guessed(partition: OriginPartition, number: int) -> ExampleAccepted:
    document = {
        "adapter": ADAPTER, "document_id": f"doc-{number}", "text": f"secret{number:03d} the blue parrot sings at noon",
        "domain": "birds",
    }  # fmt: skip
    decision = Acceptor(partition, 100, learn_turns=False).accept(json.dumps(document).encode(), None, number, 1_000)
    assert isinstance(decision, Accepted)
    event = decode(decision.value, decision.headers, "examples").event
    assert isinstance(event, ExampleAccepted)
    return event


@contextmanager
def plain_ids() -> Iterator[None]:
    """Let learners write manifests as releases without keyed ids did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update_job, "with_keyed_ids", lambda manifest, _: manifest)
        yield


def learn(store: DirectoryStore, form: str, cuts: int = 4, **settings: Any) -> tuple[LocalLearner, Any]:
    """Learn cuts of documents; with `both`, the first half of them by a release without keyed ids."""
    learner = local_learner(store, **settings)
    made = {cut: accepted(*range(cut * PER_CUT, (cut + 1) * PER_CUT)) for cut in range(cuts)}
    for cut, examples in made.items():
        request = jobs.update(store, cut, examples)
        if form == "plain" or (form == "both" and cut < cuts // 2):
            with plain_ids():
                learner.update(request, "live")
        else:
            learner.update(request, "live")
    return learner, made


def manifests(learner: LocalLearner) -> list[Manifest]:
    return [learner.registry.manifest(ADAPTER, v) for _, v in learner.registry.versions(ADAPTER, newest_first=False)]


def forms_of(*line: Manifest) -> set[str]:
    items = [item for manifest in line for item in (*manifest.learned, *manifest.skipped)]
    return {"keyed" if is_keyed(item.example_id) else "plain" for item in items}


def everything(store: DirectoryStore) -> dict[str, bytes]:
    """Return all that is stored, as somebody reads it who knows the formats."""
    found = {key: store.get(key).data for key in store.list("")}
    return {key: zlib.decompress(data[52:]) if key.startswith("history/") else data for key, data in found.items()}


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", fsync=False)


@pytest.fixture
def commands(store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")


def test_a_manifest_of_an_update_holds_no_id_that_can_be_made_without_the_key(store: DirectoryStore) -> None:
    learner, cuts = learn(store, "keyed", cuts=1, merge_share=0.5)
    (manifest,) = manifests(learner)
    key = load_text_key(store, ADAPTER)
    assert key is not None
    assert {item.example_id for item in manifest.learned} == {keyed_id(key, e.example_id) for e in cuts[0]}
    assert all(e.example_id.encode() not in manifest.to_bytes() for e in cuts[0])
    assert any(item.merged_into is not None for item in manifest.learned)
    assert {item.merged_into for item in manifest.learned} <= {None, *(item.example_id for item in manifest.learned)}


def test_a_manifest_of_a_refused_update_holds_keyed_ids_and_its_examples_may_return(store: DirectoryStore) -> None:
    learner = local_learner(store, min_gain_nats=1e9, gentler_tries=0)
    examples = accepted(0, 1, 2, 3)
    done = learner.update(jobs.update(store, 0, examples, skipped=[4]), "live")
    assert done.manifest is not None
    assert (done.outcome, forms_of(done.manifest)) == ("refused", {"keyed"})
    key = load_text_key(store, ADAPTER)
    assert key is not None
    names = [item.example_id for item in done.manifest.skipped]
    assert names == [keyed_id(key, name) for name in (f"{4:032x}", *(e.example_id for e in examples))]
    refused = load_refused_examples(store, ADAPTER)
    assert refused.keys() == {e.example_id for e in examples}, "intake compares the ids themselves"
    local_learner(store).update(jobs.update(store, 1, [e.model_copy(update={"origin": tiny.origin(9 + n)})
                                                       for n, e in enumerate(examples)]), "live")  # fmt: skip
    assert load_refused_examples(store, ADAPTER) == {}


def test_a_repeated_job_settles_by_the_ids_of_its_micro_batch(store: DirectoryStore) -> None:
    learner = local_learner(store, min_gain_nats=1e9, gentler_tries=0)
    request = jobs.waiting(store, jobs.update(store, 0, accepted(0, 1)))

    class CutOffError(Exception):
        pass

    def cut_off(name: str) -> None:
        if name == "learner.publish":
            raise CutOffError

    learner.failpoint = cut_off
    with pytest.raises(CutOffError):
        learner.update(request, "live")
    assert load_refused_examples(store, ADAPTER) == {}
    learner.failpoint = lambda _: None
    assert learner.update(request, "live").outcome == "repeated"
    assert load_refused_examples(store, ADAPTER).keys() == {e.example_id for e in accepted(0, 1)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("commands")
def test_commands_find_examples_in_manifests_of_both_forms(
    store: DirectoryStore, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    learner, cuts = learn(store, form)
    line, registry = manifests(learner), learner.registry
    assert forms_of(*line) == {"keyed": {"keyed"}, "plain": {"plain"}, "both": {"keyed", "plain"}}[form]
    names = [e.example_id for examples in cuts.values() for e in examples]
    explained = explain_examples(registry, ADAPTER, "live")
    assert sorted(item.example_id for item in explained) == sorted(names)
    assert {item.state for item in explained} == {"live"}
    assert show_plan(ADAPTER, Selector(document_ids=["doc-5"]), as_json=True) == 0
    (plan,) = json.loads(capsys.readouterr().out)["adapters"]
    assert (len(plan["versions"]), plan["replayed"]) == (3, 3), "the second version and all after it"
    assert [(item["document_id"], item["learned"]) for item in plan["examples"]] == [("doc-5", True)]
    page = adapter_history(registry, ADAPTER, "live")
    assert [version.domains for version in page.versions] == [{"birds": PER_CUT}] * len(cuts)
    assert (page.counts.learned, page.counts.skipped) == (len(names), {})
    newest = registry.head(ADAPTER)
    assert newest is not None
    assert sum(map(len, held_examples(registry, newest))) == len(names)
    stored = ExampleIndex(registry).of(ADAPTER)
    assert [(item.example.example_id, item.learned) for item in stored] == [(name, True) for name in names]


@pytest.mark.parametrize("form", FORMS)
def test_an_example_that_is_published_again_is_one_example(store: DirectoryStore, form: str) -> None:
    """It is learned by two versions; with `both`, the first names its plain id and the second a keyed one."""
    learner, cuts = learn(store, form, cuts=2)
    again = cuts[0][1].model_copy(update={"origin": tiny.origin(50), "returned": True})
    learner.update(jobs.update(store, 2, [again]), "live")
    assert counted_examples(learner.registry, ADAPTER).learned == 2 * PER_CUT
    newest = learner.registry.head(ADAPTER)
    assert newest is not None
    assert [len(group) for group in held_examples(learner.registry, newest)] == [PER_CUT - 1, PER_CUT, 1]
    assert len(explain_examples(learner.registry, ADAPTER, "live")) == 2 * PER_CUT


@pytest.mark.parametrize("form", FORMS)
def test_an_erasure_is_exact_and_what_it_makes_is_keyed(store: DirectoryStore, tmp_path: Path, form: str) -> None:
    learner, cuts = learn(store, form)
    before = {m.digest(): m.to_bytes() for m in manifests(learner)}
    done, _ = forget(learner, quarantined(store, erase("r1", 5)))
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, cuts, {5}).equals(done.manifest)
    for version, data in before.items():
        assert learner.registry.manifest(ADAPTER, version).to_bytes() == data
    key = load_text_key(store, ADAPTER)
    assert key is not None
    kept = {e.origin.offset: e.example_id for examples in cuts.values() for e in examples if e.origin.offset != 5}
    version, offsets = head(learner.registry).parent, set()
    while version is not None:
        step = learner.registry.manifest(ADAPTER, version)
        if step.kind == "replayed":
            assert forms_of(step) == {"keyed"}
            assert [item.example_id for item in step.learned] == [keyed_id(key, kept[o.offset]) for o in step.learned]
        offsets |= {item.offset for item in step.learned}
        version = step.head
    assert offsets == kept.keys()
    explained = explain_examples(learner.registry, ADAPTER, "live")
    assert sorted((item.offset, item.state) for item in explained) == sorted(
        (offset, "erased" if offset == 5 else "live") for offset in range(16)
    )
    page = adapter_history(learner.registry, ADAPTER, "live")
    assert page.counts.learned == 16
    assert all(version.domain == "birds" for version in page.versions if version.kind == "update")


def test_a_rebuild_of_skipped_examples_is_keyed_throughout(store: DirectoryStore) -> None:
    """A recorded update of a release without keyed ids, of which only what it skipped is left."""
    learner = local_learner(store)
    with plain_ids():
        learner.update(jobs.update(store, 0, accepted(0, 1, 2, 3)), "live")
        learner.update(jobs.update(store, 1, accepted(4), skipped=[5]), "live")
    forget(learner, quarantined(store, erase("r1", 4)))
    version = head(learner.registry).parent
    assert version is not None
    step = learner.registry.manifest(ADAPTER, version)
    key = load_text_key(store, ADAPTER)
    assert key is not None
    assert (step.kind, forms_of(step)) == ("replayed", {"keyed"})
    assert [item.example_id for item in step.skipped] == [keyed_id(key, f"{5:032x}")]


@pytest.mark.parametrize("form", FORMS)
def test_a_rebase_counts_examples_of_both_forms(store: DirectoryStore, form: str) -> None:
    learn(store, form)
    learner = local_learner(store, base_seed=1)
    done = rebase(learner)
    assert done.manifest is not None
    assert "16 of 16 examples learned" in done.manifest.reason


@pytest.mark.parametrize("form", FORMS)
def test_a_rebase_counts_examples_whose_key_was_lost(store: DirectoryStore, form: str) -> None:
    """It compared ids under the lost key with ids under the one that came after it, and refused for ever."""
    learn(store, form)
    store.delete(text_key_key(ADAPTER))
    done = rebase(local_learner(store, base_seed=1))
    assert done.manifest is not None
    assert "16 of 16 examples learned" in done.manifest.reason


def test_records_of_both_forms_in_one_manifest_are_told_apart(store: DirectoryStore) -> None:
    """An earlier release that forgets beside this one copies keyed records and makes plain ones."""
    learner, cuts = learn(store, "keyed", cuts=1)
    key = load_text_key(store, ADAPTER)
    assert key is not None
    (manifest,) = manifests(learner)
    first = manifest.learned[0].model_copy(update={"example_id": cuts[0][0].example_id})
    mixed = manifest.model_copy(update={"learned": [first, *manifest.learned[1:]]})
    assert count_examples([mixed, manifest], ExampleIds(key)).learned == PER_CUT


@pytest.mark.parametrize("form", FORMS)
def test_an_erased_example_is_shown_beside_another_record_at_its_offset(store: DirectoryStore, form: str) -> None:
    """After an unclean election of the leader, the same offset under a higher epoch is another record."""
    learner, cuts = learn(store, form, cuts=1)
    again = [
        example.model_copy(update={"origin": example.origin.model_copy(update={"leader_epoch": 3})})
        for example in accepted(8, 9, 10, 11)
    ]
    moved = [e.model_copy(update={"origin": e.origin.model_copy(update={"offset": n})}) for n, e in enumerate(again)]
    learner.update(jobs.update(store, 1, moved), "live")
    forget(learner, quarantined(store, erase("r1", 0)))
    assert len(cuts[0]) == PER_CUT
    states = Counter(item.state for item in explain_examples(learner.registry, ADAPTER, "live"))
    assert states["erased"] >= 1


@pytest.mark.parametrize("form", FORMS)
def test_without_the_key_examples_are_still_found_and_forgotten(
    store: DirectoryStore, tmp_path: Path, form: str
) -> None:
    """Nothing is suppressed yet, so the adapter goes on, with another key."""
    learn(store, form)
    lost = load_text_key(store, ADAPTER)
    store.delete(text_key_key(ADAPTER))
    learner = local_learner(store)
    assert {item.state for item in explain_examples(learner.registry, ADAPTER, "live")} == {"live"}
    assert load_text_key(store, ADAPTER) is None, "commands create none"
    done, _ = forget(learner, quarantined(store, erase("r1", 5)))
    cuts = {cut: accepted(*range(cut * PER_CUT, (cut + 1) * PER_CUT)) for cut in range(4)}
    assert done.manifest is not None
    assert never_saw(learner, tmp_path, cuts, {5}).equals(done.manifest)
    assert load_text_key(store, ADAPTER) not in {None, lost}
    states = {item.offset: item.state for item in explain_examples(learner.registry, ADAPTER, "live")}
    assert states == {offset: "erased" if offset == 5 else "live" for offset in range(16)}


@pytest.mark.parametrize("erased", [2, 5])
def test_whoever_has_all_but_the_key_cannot_confirm_a_guess(store: DirectoryStore, erased: int) -> None:
    learner, _ = learn(store, "keyed")
    forget(learner, quarantined(store, erase("r1", erased)))
    key = load_text_key(store, ADAPTER)
    assert key is not None
    store.delete(text_key_key(ADAPTER))
    (guess,) = accepted(erased)
    texts = [guess.text or "", guess.example_id, guess.example_id[:16]]
    stored = everything(store)
    assert any(key.startswith("manifests/") for key in stored)
    assert [name for name, data in stored.items() if any(text.encode() in data for text in texts)] == []
    assert any(keyed_id(key, guess.example_id).encode() in data for data in stored.values()), "with the key, he could"
    ids, forms = ExampleIds.load(store, ADAPTER), set[str]()
    for manifest in manifests(learner):
        forms |= {item.example_id for item in (*manifest.learned, *manifest.skipped)}
    assert forms.isdisjoint(ids.forms(guess.example_id))


def test_a_page_that_an_older_release_wrote_of_a_keyed_version_is_not_believed(store: DirectoryStore) -> None:
    """It compared the ids of the micro-batch with those of the manifest, and found none."""
    learner, cuts = learn(store, "keyed", cuts=2)
    (key,) = store.list(f"history/{ADAPTER}/")
    stored = store.get(key)
    page = HistoryPage.from_bytes(key, stored.data)
    content = json.loads(zlib.decompress(stored.data[52:]))
    assert [packed[6] for packed in content["versions"]] == [[0, 1, 2, 3], [0, 1, 2, 3]]
    empty = tuple(node.__class__(**{**_fields(node), "learned": ()}) for node in page.versions)
    written = page.__class__(page.adapter, page.level, page.first, page.before, empty, page.rebuilt, page.batches)
    store.compare_and_swap(key, written.to_bytes(), stored.etag)
    explained = explain_examples(learner.registry, ADAPTER, "live")
    assert [item.state for item in explained] == ["live"] * 8
    stored_examples = ExampleIndex(learner.registry).of(ADAPTER)
    assert [item.learned for item in stored_examples] == [True] * 8
    assert len(cuts) == 2


def _fields(node: Any) -> dict[str, Any]:
    return {name: getattr(node, name) for name in node.__dataclass_fields__}


def test_a_domain_is_unknown_only_where_the_text_is_gone(store: DirectoryStore) -> None:
    learner, _ = learn(store, "both", cuts=2)
    forget(learner, quarantined(store, erase("r1", *range(8))))
    page = adapter_history(learner.registry, ADAPTER, "live")
    assert {version.domain for version in page.versions} == {UNKNOWN_DOMAIN}
