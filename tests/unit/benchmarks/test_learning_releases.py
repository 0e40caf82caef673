"""The stream of dated documentation, on invented services in botocore's format."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from perennial.storage.errors import NotFoundError
from perennial.streams.curate.cutting.policy import CutPolicy
from perennial.streams.settings import load_settings
from tests import tiny
from tests.benchmarks.learning import __main__ as command
from tests.benchmarks.learning import releases, report
from tests.benchmarks.learning.arms import ARMS, Arm
from tests.benchmarks.learning.comparison import Comparison, Size
from tests.benchmarks.learning.releases import (
    LATEST,
    PERIODS,
    botocore_data,
    documented,
    entries,
    period_of,
    plain_text,
    release_stream,
    revised_sentences,
    versions,
)
from tests.benchmarks.learning.results import Results
from tests.benchmarks.learning.world import World

NAMES = [f"Shelf{letter}{number}" for letter in "ABCDEFGHIJKLMNOP" for number in range(4)]
DATES = {"2014-01-01": 10, "2015-03-01": 20, "2016-05-01": 30, "2020-02-02": 40}


def shelf(name: str, limit: int) -> str:
    """A text about a shelf, whose limit is what the versions revise."""
    return (
        f"<p>Puts books on the shelf <code>{name}</code>, which stands in the reading room of the library.</p>"
        f"<p>The shelf {name} takes at most {limit} books. Ask the keeper of {name} before you move it to another room, "
        "because its feet are old. A book that is not on a shelf is lost.</p>"
    )


def write(root: Path, service: str, date: str, operations: dict[str, str]) -> None:
    folder = root / service / date
    folder.mkdir(parents=True)
    model = {
        "metadata": {"serviceFullName": f"The {service} library"},
        "operations": {name: {"documentation": text} for name, text in operations.items()},
        "shapes": {
            "Plain": {},
            "NameRequest": {"documentation": None, "members": {"Name": {"documentation": "A name."}}},
        },
    }
    (folder / "service-2.json.gz").write_bytes(gzip.compress(json.dumps(model).encode()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for date, limit in DATES.items():
        write(tmp_path, "books", date, {name: shelf(name, limit) for name in NAMES})
    write(tmp_path, "single", "2014-01-01", {"Alone": shelf("Alone", 3)})
    return tmp_path


def tokens_of(example) -> int:
    return len(example.text) // 4


def stream(root: Path, seed: int = 0, order: int = 1, batches: int = 2):
    policy = CutPolicy.of(load_settings(base="shipped", env_file=None))
    return release_stream(seed, order, tokens_of, policy, batches, 5, root)


def test_tags_are_left_out_and_paragraphs_kept_apart():
    assert plain_text("<p>Use <code>a&lt;b</code>.</p><ul><li>One</li><li>two</li></ul>") == "Use a<b. One two"


def test_only_services_with_several_dates_are_taken(root: Path):
    assert {service: [path.name for path in dated] for service, dated in versions(root).items()} == {
        "books": list(DATES)
    }


def test_a_period_has_the_version_that_it_ended_with_and_the_latest_version_is_of_today():
    assert period_of(["2014-01-01", "2014-08-01", "2015-03-01", "2016-05-01"]) == {
        "2014-09": "2014-08-01", "2015-06": "2015-03-01", LATEST: "2016-05-01",
    }  # fmt: skip
    assert period_of(["2014-01-01", "2014-02-01"]) == {"2014-09": "2014-01-01", LATEST: "2014-02-01"}


def test_operations_structures_and_members_are_documented_under_names_without_dates():
    model = {
        "operations": {"GetShelf2014_01_01": {"documentation": "<p>Gets.</p>"}, "Bare": {}},
        "shapes": {"GetShelfRequest": {"documentation": "Asks.", "members": {"Id": {"documentation": "An id."}}}},
    }
    assert list(documented(model)) == [
        ("GetShelf", "GetShelf", "Gets."), ("Bare", "Bare", ""), ("structure GetShelfRequest", "GetShelf", "Asks."),
        ("GetShelfRequest.Id", "GetShelf", "An id."),
    ]  # fmt: skip


def test_an_entry_has_a_text_for_each_period_that_changed_it(root: Path):
    found = entries(root)
    assert [entry.title for entry in found] == [f"The books library, {name}" for name in NAMES]
    assert all(list(entry.texts) == [*PERIODS, LATEST] for entry in found)
    assert 2 <= sum(entry.is_held_out for entry in found) <= 30


def test_sentences_are_paired_with_what_they_revise():
    before = "A shelf takes 10 books. It is red. Ask first. Old feet break."
    after = "A shelf takes 20 books. It is red. Nothing of this was said before, in any words. Old feet break."
    assert revised_sentences(before, after) == [("A shelf takes 10 books.", "A shelf takes 20 books.")]
    assert revised_sentences(before, before.replace("Ask first.", "Ask  first!")) == [], "no word differs"
    assert revised_sentences(before, f"{before} More.") == []


def test_later_versions_supersede_earlier_ones_and_are_asked_for_by_what_changed(root: Path):
    found = stream(root)
    assert found.domains == (*PERIODS, LATEST)
    text_of = {e.example_id: e.text for block in found.blocks for e in block.examples}
    period_of_id = {e.example_id: n for n, block in enumerate(found.blocks) for e in block.examples}
    assert len(found.replaces) == len(set(found.replaces.values())) > 10
    assert found.questions.keys() == found.replaces.keys(), "every revision changes a sentence here"
    for new, old in found.replaces.items():
        assert period_of_id[old] < period_of_id[new]
        assert text_of[new].split("\n")[0] == text_of[old].split("\n")[0]
        current, stale = found.questions[new].documents
        assert current in text_of[new]
        assert stale in text_of[old]
        assert stale not in text_of[new]
    for block in found.blocks[1:]:
        for example in block.examples:
            assert len(example.supersedes) == (example.example_id in found.replaces)


def test_nothing_that_is_measured_is_trained(root: Path):
    found = stream(root)
    trained = {e.text.split("\n")[0] for block in found.blocks for e in block.examples}
    measured = {text.split("\n")[0] for texts in found.held_out.values() for text in texts}
    assert measured
    assert not trained & measured


def test_a_seed_draws_the_documents_and_an_order_only_arranges_them(root: Path):
    first, again, other, turned = stream(root), stream(root), stream(root, seed=1), stream(root, order=2)
    assert first.digest == again.digest != other.digest
    ids = [[{e.example_id for e in block.examples} for block in s.blocks] for s in (first, turned)]
    assert ids[0] == ids[1]
    assert first.digest != turned.digest
    assert first.questions == turned.questions


@pytest.mark.slow(20)
def test_every_period_is_measured_and_revised_documents_are_asked_for(root: Path, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("runs")
    general = folder / "texts.jsonl"
    general.write_text("".join(json.dumps({"text": f"plain words, number {n}, on nothing"}) + "\n" for n in range(80)))
    of = Arm.settings
    monkeypatch.setattr(Arm, "settings", lambda arm, _: of(arm, "shipped"))
    monkeypatch.setattr(releases, "botocore_data", lambda: root)
    settings = load_settings(base="shipped", env_file=None, device="cpu", threads=1, general_texts=str(general))
    world = World(tiny.base(), settings, runs=2, general=4)
    size = Size(batches=1, held_out=2, seeds=(0,), orders=(1,), release_batches=1)
    arms = [ARMS[name] for name in ("frozen", "sequential", "joint")]
    records = Comparison(world, Results(folder / "runs.jsonl"), "releases", arms, size, 2, say=lambda _: None).run()
    assert {arm for arm, _, _ in records} == {"frozen", "ours", "sequential"}, "a shuffled stream has no revisions"
    ours = records["ours", 0, 1]
    assert ours["domains"] == [*PERIODS, LATEST] == [stage["after"] for stage in ours["stages"]]
    asked = [found for update in ours["updates"] for found in update["asked"]]
    assert asked
    assert {found["earlier"] for found in asked} == {1}
    assert all(0 < nats < 10 for found in asked for nats in found["documents"]), "nats per token, not per choice"
    assert "asked" not in ours["stages"][0]
    assert len(records["frozen", 0, 1]["stages"][-1]["asked"]) == len(ours["stages"][-1]["asked"]) > 0
    found = report.means(records)["ours"]
    assert found["stale_pct"] + found["right_pct"] == pytest.approx(100)
    line = report.last_line({"releases": records}, {})
    assert line["stale_releases_pct"] == pytest.approx(found["stale_pct"], abs=1e-3)
    assert line["stale_pct"] is None


def test_the_summary_counts_documents_revisions_and_changed_numbers(root: Path, monkeypatch, capsys):
    monkeypatch.setattr(releases, "botocore_data", lambda: root)
    releases.main()
    lines = capsys.readouterr().out.splitlines()
    held_out = sum(entry.is_held_out for entry in entries(root))
    assert lines[2:] == [
        f"| 2014-09 | {len(NAMES)} | 0 | 0 | 0 | {held_out} |",
        *(
            f"| {period} | {len(NAMES)} | {' | '.join([str(len(NAMES))] * 3)} | {held_out} |"
            for period in (*list(PERIODS)[1:], LATEST)
        ),
    ]


def test_the_stream_is_skipped_with_a_reason_where_botocore_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(releases, "find_spec", lambda _: None)
    with pytest.raises(NotFoundError, match="needs botocore"):
        botocore_data()
    assert command._installed(["domains", "releases"]) == ["domains"]
    assert "releases: skipped: the stream `releases` needs botocore" in capsys.readouterr().out
    assert command._installed(["domains"]) == ["domains"]
    assert "botocore" not in sys.modules
