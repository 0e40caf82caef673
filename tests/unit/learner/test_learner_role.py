"""What a role writes to its log."""

from __future__ import annotations

import logging

from perennial.streams.cli.worker import OneLineFormatter


def test_an_id_from_outside_forges_no_line_of_the_log_and_a_traceback_keeps_its_lines():
    record = logging.makeLogRecord({
        "name": "perennial.retain", "levelname": "INFO", "msg": "%s: closed",
        "args": ("r1\n2026-01-31 E perennial: all is lost\x1b[2K\r\u2028",),
    })  # fmt: skip
    said = OneLineFormatter("%(levelname).1s %(name)s: %(message)s").format(record)
    assert said == ("I perennial.retain: r1\\n2026-01-31 E perennial: all is lost\\x1b[2K\\r\\u2028: closed")
    record.exc_text = "Traceback\n  line"
    assert OneLineFormatter("%(message)s").format(record).endswith("\nTraceback\n  line")
