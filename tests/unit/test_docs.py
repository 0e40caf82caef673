"""What the documents name exists: files, links, alerts, terms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TOP_LEVEL = "streams|learner|storage|perennial|tools|tests|docs|deploy|examples"
OPERATIONS = (ROOT / "docs" / "operations.md").read_text("utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_named_exists(document):
    text = re.sub(r"```.*?```", "", document.read_text("utf-8"), flags=re.DOTALL)
    named = re.findall(rf"\b((?:{TOP_LEVEL})/[\w./-]+\w)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", document.read_text("utf-8"))
    broken = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert broken == []


def test_every_alert_has_its_section_and_no_other():
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules/perennial.yml").read_text("utf-8"))
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    sections = re.findall(r"^### (\w+)$", OPERATIONS.partition("## Alerts")[2], re.MULTILINE)
    assert sections == alerts


def test_decisions_are_numbered_without_gaps_and_listed():
    files = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert [int(file.name[:4]) for file in files] == list(range(1, len(files) + 1))
    listed = re.findall(r"\((\d{4}-[\w-]+\.md)\)", (ROOT / "docs/decisions/README.md").read_text("utf-8"))
    assert listed == [file.name for file in files]
    for file in files:
        text = file.read_text("utf-8")
        for heading in ("# ", "Status: ", "## Context", "## Decision", "## Alternatives", "## Consequences"):
            assert f"\n{heading}" in f"\n{text}", f"{file.name} lacks {heading}"


def test_the_shipped_models_origin_is_told():
    assert "Python Software Foundation" in (ROOT / "NOTICE").read_text("utf-8")
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")
