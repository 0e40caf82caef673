"""Lay out the page of an adapter."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from xml.etree.ElementTree import Element

from perennial.streams.cli.adapter_page.adapter_history import AdapterHistory, HistoryVersion, MeasuredLosses
from perennial.streams.cli.adapter_page.page_charts import SERIES_COLOURS, Point, dot_chart, heat_colours
from perennial.streams.cli.adapter_page.page_elements import element
from perennial.streams.cli.adapter_page.page_style import STYLE
from perennial.streams.cli.tables import short_version

MAX_COLUMNS = 12
"""Most columns of a heat map; a recorded one puts neighbouring updates together."""
MAX_DOMAINS = 40
MAX_LISTED = 200
_MAX_NAME = 48


def page(history: AdapterHistory, made_at: datetime) -> Element:
    """Return the page.

    Args:
        history: What it shows.
        made_at: When it was made.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # whatever the page holds, it loads and runs nothing
    style = element("style")
    style.text = STYLE
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{history.adapter}: history"),
        style,
    )
    series = {domain: number for number, domain in enumerate(history.domains)}
    body = element(
        "body",
        element("h1", history.adapter),
        _facts(history),
        _losses(history, series),
        _matrix(history),
        _general(history),
        _examples(history),
        _decisions(history, series),
        element("footer", f"Made by perennial adapters report at {made_at.isoformat(timespec='seconds')}."),
    )
    return element("html", head, body, lang="en")


def _facts(history: AdapterHistory) -> Element:
    updates = [version for version in history.versions if version.kind == "update"]
    refused = sum(version.outcome == "refused" for version in updates)
    promoted = sum(version.outcome == "promoted" for version in updates)
    facts: dict[str, str | None] = {
        "base": f"{history.base} ({history.base_sha256[:19]}…)",
        "live version": "none" if history.live is None
        else f"{short_version(history.live)}, generation {history.generation}, since {history.live_since}",
        "updates": f"{len(updates)}: {promoted} promoted, {refused} refused, {len(updates) - promoted - refused} with nothing to learn",
        "cut by drift": f"{sum(version.cut_by_drift for version in updates)} of those promoted",
        "waiting": f"{history.jobs_waiting} updates" if history.jobs_waiting else None,
        "parked": history.parked or None,
        "device time": None if history.device_seconds is None
        else f"{history.device_seconds:,.1f} s for the updates of which it is recorded",
        "not shown": f"{history.earlier_versions} versions before these" if history.earlier_versions else None,
    }  # fmt: skip
    rows = [(element("dt", name), element("dd", value)) for name, value in facts.items() if value is not None]
    return element("dl", [part for row in rows for part in row], class_="facts")


def _section(title: str, *children: Element | str | None) -> Element:
    return element("section", element("h2", title), *children)


def _legend(series: Mapping[str, int]) -> Element:
    """Return the domains with their colours; those behind the last colour share the first ones, and say so."""
    shown = list(series.items())[:SERIES_COLOURS]
    items = [element("li", element("span", class_=f"swatch s{number}"), _name(name)) for name, number in shown]
    if len(series) > SERIES_COLOURS:
        items.append(element("li", f"and {len(series) - SERIES_COLOURS} more domains, whose colours repeat"))
    return element("ul", items, class_="legend")


def _losses(history: AdapterHistory, series: Mapping[str, int]) -> Element:
    title = "Loss of each update's own examples"
    points = [
        Point(
            version.seq, version.gate.loss_after, _told(version), series.get(version.domain),
            refused=version.outcome == "refused", start=version.gate.loss_before,
        )
        for version in history.versions
        if version.kind == "update" and version.gate.loss_after is not None
    ]  # fmt: skip
    if not points:
        return _section(title, _empty("No update has been measured by the gate yet."))
    marks = [
        (version.seq, f"version {version.seq}: cut by drift") for version in history.versions if version.cut_by_drift
    ]
    said = (
        "Each stroke is an update: from the loss of its examples before it (hollow) to the loss after it (filled), as the "
        "gate measured them: on examples held out, or on rows it trained where nothing was held out. A cross is an update "
        "that the gate refused. "
    )
    drift = (
        f"A dashed vertical line is an update whose micro-batch drift cut; there are {len(marks)}. " if marks
        else "No promoted update was cut by drift. "
    ) + "Detections that cut nothing are on the topic drift, not in the store."  # fmt: skip
    chart = dot_chart(points, title=title, unit="loss (nats per token)", marks=marks)
    return _section(title, element("p", said + drift), _legend(series), _scrolled(chart))


def _told(version: HistoryVersion) -> str:
    gate = version.gate
    losses = (
        ""
        if gate.loss_before is None or gate.loss_after is None
        else f", {gate.loss_before:.3f} → {gate.loss_after:.3f} nats"
    )
    return f"version {version.seq}, {version.outcome} ({version.reason}), {version.domain}{losses}"


# ---- the matrix


def _matrix(history: AdapterHistory) -> Element:
    title = "Loss by domain over versions"
    if history.measured is not None:
        return _measured_matrix(title, history.measured)
    updates = [
        version for version in history.versions if version.kind == "update" and version.gate.loss_after is not None
    ]
    if not updates:
        return _section(title, _empty("No update has been measured by the gate yet."))
    groups = _grouped(updates)
    domains = list(dict.fromkeys(version.domain for version in updates))
    shown = domains[:MAX_DOMAINS]
    columns = [_range([version.seq for version in group]) for group in groups]
    cells = [
        [_mean([version.gate.loss_after for version in group if version.domain == domain]) for group in groups]
        for domain in shown
    ]
    said = (
        "Rows are domains, columns are versions, in order. A cell is the loss after the updates that learned this domain, on "
        "their own examples. An adapter's history has no other cells: an update does not measure the domains that it does "
        "not learn. To measure every cell, run "
    )
    return _section(
        title, element("p", said, element("code", f"perennial adapters report {history.adapter} --measure"), "."),
        _heat_map(shown, columns, cells),
        element("p", f"{len(domains) - MAX_DOMAINS} further domains are not shown.") if len(domains) > MAX_DOMAINS else None,
    )  # fmt: skip


def _measured_matrix(title: str, measured: MeasuredLosses) -> Element:
    said = (
        "Rows are domains, in the order in which they were first learned; columns are versions. A cell is the mean loss of "
        "stored examples of the domain under the version, measured when this page was made. The examples were trained, so "
        "this shows what is kept and what is overwritten, not how new text of the domain fares. A row that grows paler to "
        "the right is being forgotten: the last column says by how much the newest version is above the best."
    )
    columns = ["base" if column == 0 else str(column) for column in measured.columns]
    names = [f"{domain} ({measured.examples[domain]} examples)" for domain in measured.domains]
    lost = [f"+{row[-1] - min(row):.2f}" for row in measured.nats]
    return _section(title, element("p", said), _heat_map(names, columns, measured.nats, lost))


def _grouped(updates: Sequence[HistoryVersion]) -> list[list[HistoryVersion]]:
    size = -(-len(updates) // MAX_COLUMNS)
    return [list(updates[start : start + size]) for start in range(0, len(updates), size)]


def _range(seqs: Sequence[int]) -> str:
    return str(seqs[0]) if len(seqs) == 1 else f"{seqs[0]}–{seqs[-1]}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[float | None]],
    lost: Sequence[str] | None = None,
) -> Element:
    known = [value for row in cells for value in row if value is not None]
    low, high = min(known), max(known)
    names = ["domain \\ version", *columns, *(["now − best"] if lost else [])]
    body = []
    for number, (name, row) in enumerate(zip(rows, cells, strict=True)):
        last = element("td", lost[number]) if lost else None
        body.append(
            element("tr", element("th", _name(name), scope="row"), [_cell(value, low, high) for value in row], last)
        )
    head = element("thead", element("tr", [element("th", name, scope="col") for name in names]))
    table = element("table", head, element("tbody", body), class_="heat")
    key = f"nats per token; dark is low ({low:.2f}), pale is high ({high:.2f})"
    return element("div", _scrolled(table), element("p", key, class_="key"))


def _cell(value: float | None, low: float, high: float) -> Element:
    if value is None:
        return element("td", "·", class_="none")
    ground, ink = heat_colours(value, low, high)
    return element("td", f"{value:.2f}", style=f"background:{ground};color:{ink}")


# ---- the rest


def _general(history: AdapterHistory) -> Element:
    title = "General drift"
    points = [
        Point(version.seq, rise, f"version {version.seq}, {version.outcome} ({version.reason}): {rise:+.3f} nats",
              refused=version.outcome == "refused")
        for version in history.versions
        if (rise := version.general_rise_nats) is not None
    ]  # fmt: skip
    if not points:
        return _section(title, _empty("No version has a measured general loss."))
    limits = [version.general_limit_nats for version in history.versions if version.general_limit_nats is not None]
    lines = [(0.0, "the frozen base", "ground")]
    said = (
        "By how much the loss on general text, on which the base was trained, is above the frozen base's. The rows of text "
        "rotate, so neighbouring points differ by chance too. A cross is an update that the gate refused."
    )
    if limits and limits[-1] <= 4 * max(0.05, *(abs(point.y) for point in points)):
        lines.append((limits[-1], "the gate's limit", "limit"))
    elif limits:
        said += f" The gate's limit, {limits[-1]:g}, is far above what is shown."
    chart = dot_chart(points, title=title, unit="rise (nats per token)", limits=lines, joined=True)
    return _section(title, element("p", said), _scrolled(chart))


def _examples(history: AdapterHistory) -> Element:
    counts = history.counts
    shown = {"learned": counts.learned, **dict(sorted(counts.skipped.items()))}
    shown = {name: count for name, count in shown.items() if count}
    title = "What became of every example"
    if not shown:
        return _section(title, _empty("No example has come to this adapter yet."))
    total, most = sum(shown.values()), max(shown.values())
    rows = [
        element(
            "tr",
            element("th", _name(_fate(name)), scope="row"),
            element("td", f"{count:,}", class_="number"),
            element("td", f"{count / total:.1%}", class_="number"),
            element("td", element("span", class_="bar", style=f"width:{100 * count / most:.1f}%"), class_="bars"),
        )
        for name, count in shown.items()
    ]
    said = f"An example counts by the newest of {counts.versions} versions that had it."
    if counts.merged:
        said += f" Of {counts.merged:,} of the learned ones only what they do not share with another was trained."
    if counts.forgotten:
        said += f" {counts.forgotten} of them were removed again by requests to forget."
    if counts.earlier_versions:
        said += f" {counts.earlier_versions} versions before these are not counted."
    return _section(title, element("p", said), element("table", element("tbody", rows), class_="fates"))


def _fate(name: str) -> str:
    meanings = {
        "learned": "learned", "duplicate": "not learned: a duplicate",
        "signal": "not learned: only a signal, such as a rating", "no-text": "not learned: nothing to train",
        "no-text-on-base": "not learned: nothing to train on this base",
        "quarantined": "not learned: to be forgotten", "expired": "not learned: expired before it was learned",
    }  # fmt: skip
    return meanings.get(name, f"not learned: {name}")


def _decisions(history: AdapterHistory, series: Mapping[str, int]) -> Element:
    title = "What the gate decided"
    names = (
        "seq",
        "version",
        "made by",
        "outcome",
        "reason",
        "tries",
        "examples",
        "tokens",
        "loss before → after",
        "general",
        "domain",
    )
    rows = [_decision(version, series) for version in reversed(history.versions[-MAX_LISTED:])]
    refused: dict[str, int] = {}
    for version in history.versions:
        if version.outcome == "refused":
            refused[version.reason] = refused.get(version.reason, 0) + 1
    said = "The gate refused nothing." if not refused else "Refused: " + ", ".join(
        f"{count} for {reason}" for reason, count in sorted(refused.items())
    ) + "."  # fmt: skip
    if len(history.versions) > MAX_LISTED:
        said += f" The newest {MAX_LISTED} versions are listed."
    table = element("table", element("thead", element("tr", [element("th", name, scope="col") for name in names])),
                    element("tbody", rows), class_="list")  # fmt: skip
    return _section(title, element("p", said), _scrolled(table))


def _decision(version: HistoryVersion, series: Mapping[str, int]) -> Element:
    gate, rise = version.gate, version.general_rise_nats
    before, after = gate.loss_before, gate.loss_after
    tags = [
        name
        for name, there in (
            ("live", version.live),
            ("weights collected", version.collected),
            ("drift", version.cut_by_drift),
        )
        if there
    ]
    trained = version.kind in {"update", "replayed"}
    domain = (
        [element("span", class_=f"swatch s{series[version.domain] % SERIES_COLOURS}")]
        if trained and version.domain in series
        else []
    )
    more = len(version.domains) - 1
    return element(
        "tr",
        element("td", str(version.seq), class_="number"),
        element("td", element("code", short_version(version.version), title=version.version),
                [element("span", tag, class_=f"tag {tag.split()[-1]}") for tag in tags]),
        element("td", version.kind),
        element("td", version.outcome, class_=f"outcome {version.outcome}"),
        element("td", version.reason, class_="reason"),
        element("td", str(gate.tries or 1) if trained and version.tokens else "", class_="number"),
        element("td", str(version.examples) if trained else "", class_="number"),
        element("td", f"{version.tokens:,}" if version.tokens else "", class_="number"),
        element("td", "" if before is None or after is None else f"{before:.3f} → {after:.3f}", class_="number"),
        element("td", "" if rise is None else f"{rise:+.3f}", class_="number"),
        element("td", domain, _name(version.domain) if trained else None, f" and {more} more" if trained and more > 0 else None,
                class_="reason"),
        class_=version.outcome,
    )  # fmt: skip


def _name(text: str) -> Element:
    """Return a name; of a long one the beginning, and all of it where the pointer rests on it."""
    short = text if len(text) <= _MAX_NAME else text[: _MAX_NAME - 1] + "…"
    return element("span", short, title=text if short != text else None)


def _empty(text: str) -> Element:
    return element("p", text, class_="empty")


def _scrolled(child: Element) -> Element:
    return element("div", child, class_="scrolled")
