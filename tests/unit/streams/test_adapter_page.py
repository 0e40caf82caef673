"""`perennial adapters report`: what the page says, that nothing from outside becomes markup, and what a browser shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from perennial.storage.errors import NotFoundError
from perennial.storage.objects.directory_store import DirectoryStore
from perennial.storage.registry.gate_figures import GateFigures
from perennial.storage.registry.history.update_costs import UpdateCost, record_cost
from perennial.storage.registry.manifest import LearnedExample, SkippedExample
from perennial.streams.cli.adapter_page import page_charts
from perennial.streams.cli.adapter_page.adapter_history import (
    UNKNOWN_DOMAIN,
    AdapterHistory,
    HistoryVersion,
    MeasuredLosses,
    adapter_history,
)
from perennial.streams.cli.adapter_page.page_elements import element, html_bytes
from perennial.streams.cli.adapter_page.page_layout import MAX_COLUMNS, MAX_DOMAINS, page
from perennial.streams.cli.adapter_page.page_writer import write_report
from perennial.streams.cli.example_counts import ExampleCounts
from perennial.testing import small_weights
from tests.services import missing_service
from tests.versions import VersionPublisher

ADAPTER = "acme/support"
NOW = datetime(2026, 1, 2, tzinfo=UTC)
HOSTILE = "</style><script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>&amp;\x00\u202e\ud800]]>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def gate(before: float | None = 4.0, after: float | None = 3.5, rise: float = 0.02, **more: Any) -> GateFigures:
    return GateFigures(
        basis="held-out", held_out_before=before, held_out_after=after, anchor_base=3.0, anchor_after=3.0 + rise, **more
    )


def version(seq: int, domain: str = "faq", **more: Any) -> HistoryVersion:
    given: dict[str, Any] = {
        "kind": "update", "outcome": "promoted", "reason": "size", "examples": 8, "tokens": 4000, "gate": gate(),
        "general_limit_nats": 0.15, "domains": {domain: 8}, "live": False, "collected": False, **more,
    }  # fmt: skip
    return HistoryVersion(seq=seq, version=f"sha256:{seq:064x}", domain=domain, **given)


def history(*versions: HistoryVersion, **more: Any) -> AdapterHistory:
    given: dict[str, Any] = {
        "base": "shipped", "base_sha256": "sha256:" + "b" * 64, "generation": 3, "live": None, "live_since": None,
        "parked": "", "jobs_waiting": 0, "earlier_versions": 0, "counts": ExampleCounts(0, 0, {}, len(versions)), **more,
    }  # fmt: skip
    return AdapterHistory(adapter=given.pop("adapter", ADAPTER), versions=versions, **given)


def ugly_history() -> AdapterHistory:
    """Return a history with everything that is long, many, hostile or refused."""
    domains = [HOSTILE, "x" * 200, *(f"domain number {number}" for number in range(10))]
    versions = [
        version(
            seq,
            domains[seq * 7 % len(domains)],
            outcome="refused" if seq % 9 == 0 else "promoted",
            reason="general-rise" if seq % 9 == 0 else "drift" if seq % 11 == 0 else HOSTILE if seq == 5 else "size",
            gate=gate(
                4 + seq % 5 / 10, 3.9 - seq / 100, 0.1 * (seq % 9 == 0) + seq / 2000, tries=3 if seq % 9 == 0 else None
            ),
            live=seq == 59,
            collected=seq < 20,
        )
        for seq in range(1, 61)
    ]
    return history(
        *versions, adapter="/".join(["a" * 60] * 3), live=versions[-2].version, live_since="2026-01-02T03:04:05+00:00",
        parked=f"no-space: {HOSTILE}", jobs_waiting=4, earlier_versions=240,
        counts=ExampleCounts(5210, 14, {"general-rise": 412, "signal": 1200, HOSTILE: 1}, 60, 240), device_seconds=1234.5,
    )  # fmt: skip


def rendered(shown: AdapterHistory) -> str:
    return html_bytes(page(shown, NOW)).decode()


class Parsed(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


# ---- what is safe


@pytest.mark.parametrize("shown", [ugly_history(), history(), replace(ugly_history(), adapter=HOSTILE)])
def test_the_page_is_well_formed_and_loads_and_runs_nothing(shown):
    parsed = Parsed(rendered(shown))
    assert parsed.open == []
    assert not {"script", "img", "iframe", "link", "object", "embed", "base", "form", "a"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in {"href", "src", "srcset"}]
    assert [value for name, value in parsed.attributes if "url(" in (value or "")] == []
    assert parsed.tags.count("style") == 1
    assert "url(" not in "".join(parsed.texts["style"])
    assert "@import" not in "".join(parsed.texts["style"])
    (policy,) = (value for name, value in parsed.attributes if (value or "").startswith("default-src"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_hostile_text_is_shown_as_text():
    parsed = Parsed(rendered(replace(ugly_history(), adapter=HOSTILE)))
    (title,) = parsed.texts["h1"]
    assert title.startswith("</style><script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>&amp;")
    assert title.endswith("\\x00\\u202e\\ud800]]>")


def test_an_element_escapes_texts_attributes_and_tails():
    made = element("p", "<", element("b", "&", title='"<'), ">", class_="a b", x_y=1, none=None)
    assert html_bytes(made).decode() == (
        '<!DOCTYPE html>\n<p class="a b" x-y="1">&lt;<b title="&quot;<">&amp;</b>&gt;</p>\n'
    )


# ---- what it says


def test_an_adapter_without_measurements_has_words_instead_of_charts():
    shown = rendered(history(version(1, kind="rollback", gate=GateFigures(), tokens=0)))
    assert "<svg" not in shown
    assert shown.count('class="empty"') == 4
    assert "NaN" not in shown


def test_each_update_is_a_stroke_and_a_refused_one_a_cross():
    shown = rendered(history(version(1), version(2, outcome="refused", reason="no-gain"), version(3, reason="drift")))
    losses = shown[shown.index("Loss of each") : shown.index("Loss by domain")]
    assert losses.count('class="hollow"') == 3
    assert losses.count('class="dot"') == 2
    assert losses.count('class="cross"') == 1
    assert losses.count('class="mark"') == 1
    assert "version 2, refused (no-gain), faq, 4.000 → 3.500 nats" in losses
    assert "Refused: 1 for no-gain." in shown


def test_the_recorded_matrix_has_a_cell_only_where_an_update_learned_the_domain():
    shown = rendered(
        history(version(1, "a", gate=gate(5, 4)), version(2, "b", gate=gate(5, 3)), version(3, "a", gate=gate(5, 2)))
    )
    assert cells(shown) == [["4.00", "·", "2.00"], ["·", "3.00", "·"]]
    assert "dark is low (2.00), pale is high (4.00)" in shown


def test_many_updates_share_columns_and_their_mean():
    versions = [version(seq, gate=gate(5, seq / 10)) for seq in range(1, 2 * MAX_COLUMNS + 1)]
    (row,) = cells(rendered(history(*versions)))
    assert len(row) == MAX_COLUMNS
    assert row[:2] == ["0.15", "0.35"]


def test_domains_beyond_those_shown_are_counted():
    versions = [version(seq, f"d{seq}") for seq in range(1, MAX_DOMAINS + 4)]
    shown = rendered(history(*versions))
    assert len(cells(shown)) == MAX_DOMAINS
    assert "3 further domains are not shown." in shown


def test_the_measured_matrix_says_what_was_lost_since_the_best():
    measured = MeasuredLosses(["a", "b"], [0, 1, 2], [[5.0, 3.0, 3.25], [5.0, 4.5, 2.0]], {"a": 16, "b": 3})
    shown = rendered(history(version(1), measured=measured))
    assert cells(shown) == [["5.00", "3.00", "3.25", "+0.25"], ["5.00", "4.50", "2.00", "+0.00"]]
    assert "b (3 examples)" in shown


def cells(shown: str) -> list[list[str]]:
    """Return the cells of the heat map, row by row, without the names of the domains."""
    table = shown[shown.index('<table class="heat">') :]
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in body.split("</tr>")[:-1]]


def test_what_became_of_the_examples_adds_up():
    shown = rendered(history(version(1), counts=ExampleCounts(60, 7, {"signal": 30, "no-gain": 10}, 1)))
    fates = shown[shown.index('class="fates"') :]
    assert re.findall(r">([\d.]+)%<", fates) == ["60.0", "10.0", "30.0"]
    assert "7 of them were removed again by requests to forget." in shown


@pytest.mark.parametrize(
    ("rise", "line"), [(0.05, "the gate&#x27;s limit"), (0.05, "the gate's limit"), (0.0001, "far above what is shown")]
)
def test_the_limit_is_a_line_only_where_it_fits_the_chart(rise, line):
    limit = 0.15 if rise > 0.01 else 50.0
    shown = rendered(history(version(1, gate=gate(rise=rise), general_limit_nats=limit)))
    assert line.replace("&#x27;", "'") in shown


@pytest.mark.parametrize(("low", "high"), [(3.1, 4.7), (-0.002, 0.0007), (0.0, 1e6), (5.0, 5.0)])
def test_the_ticks_of_an_axis_are_round_and_within_it(low, high):
    points = [page_charts.Point(1, low, "a"), page_charts.Point(2, high, "b")]
    svg = html_bytes(page_charts.dot_chart(points, title="t", unit="nats")).decode()
    ticks = [float(value) for value in re.findall(r'class="tick end"[^>]*>([^<]*)<', svg)]
    room = (high - low) * 0.1 or 1
    assert 2 <= len(ticks) <= 8
    assert len(set(ticks)) == len(ticks)
    assert all(low - room <= tick <= high + room for tick in ticks)


# ---- from the store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERENNIAL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("PERENNIAL_KAFKA", "127.0.0.1:1")
    return DirectoryStore(tmp_path / "store", fsync=False)


def publish(store: DirectoryStore) -> VersionPublisher:
    """Publish a promoted and a refused version that learned examples whose text the store does not have."""
    publisher = VersionPublisher(store, ADAPTER)
    weights = small_weights(1)
    learned = LearnedExample(example_id="e1", partition="p", offset=0, tokens=5)
    first = publisher.manifest(weights).model_copy(
        update={"learned": [learned], "gate": gate(), "tokens": 5, "reason": "drift"}
    )
    made = publisher.registry.publish(first, [weights], lambda _: None)
    cost = UpdateCost(
        version=made.version, seq=1, outcome="promoted", tokens=5, training_flops=1, measuring_flops=1, seconds=2.5
    )
    record_cost(store, ADAPTER, cost)
    skipped = SkippedExample(example_id="e2", partition="p", offset=1, reason="no-gain")
    second = publisher.manifest(weights).model_copy(
        update={"outcome": "refused", "reason": "no-gain", "skipped": [skipped], "gate": gate(4.0, 4.1), "tokens": 5}
    )
    publisher.registry.publish(second, [weights], lambda _: None)
    return publisher


def test_the_history_is_read_from_manifests(store):
    publisher = publish(store)
    found = adapter_history(publisher.registry, ADAPTER, "live")
    assert [(v.seq, v.outcome, v.examples, v.domain, v.live) for v in found.versions] == [
        (1, "promoted", 1, UNKNOWN_DOMAIN, True), (2, "refused", 1, UNKNOWN_DOMAIN, False)
    ]  # fmt: skip
    assert [v.cut_by_drift for v in found.versions] == [True, False]
    assert (found.counts.learned, found.counts.skipped) == (1, {"no-gain": 1})
    assert found.device_seconds == 2.5
    assert found.versions[0].general_rise_nats == pytest.approx(0.02)


def test_the_command_writes_one_file_and_says_where(store, tmp_path, capsys):
    publish(store)
    assert write_report(ADAPTER, None, measure=False, as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["file"] == str(tmp_path / "acme-support.html")
    assert Path(said["file"]).read_bytes().startswith(b"<!DOCTYPE html>")
    assert write_report(ADAPTER, tmp_path / "other.html", measure=False, as_json=False) == 0
    assert "other.html: 2 versions of acme/support" in capsys.readouterr().out


def test_an_unknown_adapter_is_not_found(store):
    with pytest.raises(NotFoundError):
        write_report("acme/none", None, measure=False, as_json=False)


# ---- in a browser


def browser(*arguments: str, file: Path) -> str:
    """Return what the browser printed of the file.

    Skips the test (or fails it, see `missing_service`) without a browser.
    """
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if binary is None:
        missing_service("no chromium on PATH: apt-get install chromium")
        raise AssertionError
    command = [
        binary, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
        "--user-data-dir=" + str(file.parent / "profile"), *arguments, file.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_browser_shows_the_hostile_page_and_runs_nothing(tmp_path):
    file = tmp_path / "page.html"
    file.write_bytes(html_bytes(page(replace(ugly_history(), adapter=HOSTILE), NOW)))
    shown = Parsed(browser("--dump-dom", file=file))
    assert "script" not in shown.tags
    assert "img" not in shown.tags
    assert "owned" not in "".join(shown.texts["title"][:1]).removeprefix(HOSTILE[:60])
    assert shown.tags.count("svg") == 2
    assert "".join(shown.texts["h1"]).startswith("</style><script>")


def test_a_browser_draws_the_charts_in_a_narrow_and_a_wide_window(tmp_path):
    from PIL import Image

    file = tmp_path / "page.html"
    file.write_bytes(html_bytes(page(ugly_history(), NOW)))
    for width in (600, 1400):
        picture = tmp_path / f"{width}.png"
        browser(f"--window-size={width},4500", f"--screenshot={picture}", file=file)
        with Image.open(picture) as image:
            colours = image.convert("RGB").getcolors(1 << 24) or []
        found = {colour for count, colour in colours if count >= 20}
        assert {(0, 114, 178), (213, 94, 0), (180, 35, 24)} <= found, "two domains and the limit, or the word refused"
