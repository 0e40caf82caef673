"""Generators of documents and dashboards, and the pre-training of the shipped base; not part of the wheel."""
