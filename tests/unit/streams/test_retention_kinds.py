"""The table of retention kinds: complete, equal to the wire's type, and each row carried out by something."""

from __future__ import annotations

from typing import get_args

import pytest

from perennial.streams.events.models import RetentionKind, RetentionRequested, Selector
from perennial.streams.retain.state_machine import RequestProcessor
from perennial.streams.retention.kinds import KINDS, refusal_of


def test_the_table_and_the_type_on_the_wire_name_the_same_kinds():
    assert tuple(KINDS) == get_args(RetentionKind)
    assert all(row.kind == kind for kind, row in KINDS.items())


def test_every_accepted_kind_without_a_job_is_carried_out_by_retain():
    own = {kind for kind, row in KINDS.items() if row.job is None and not row.refused_because}
    assert own == set(RequestProcessor._WITHOUT_JOB)


@pytest.mark.parametrize("row", KINDS.values(), ids=list(KINDS))
def test_a_row_is_consistent(row):
    assert row.summary.endswith(".")
    assert row.job == "forget" or not row.suppresses_text
    assert bool(row.done) != bool(row.refused_because)
    assert set(row.requires) <= set(RetentionRequested.model_fields)


@pytest.mark.parametrize("row", KINDS.values(), ids=list(KINDS))
def test_a_request_by_the_row_is_accepted(row):
    selector = None if row.selector == "refused" else Selector(retention_class="permanent")
    request = RetentionRequested(
        request_id="r", kind=row.kind, adapter="acme/a", selector=selector, requested_by="ann",
        **dict.fromkeys(row.requires, "P1D"),
    )  # fmt: skip
    assert refusal_of(request, 0) == row.refused_because
