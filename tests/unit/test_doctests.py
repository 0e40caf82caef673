"""The examples in docstrings run and show what they say. Add a module to MODULES when it gets its first example."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "perennial.learner.serving.peft_backend",
    "perennial.streams.client.directory_backend",
    "perennial.streams.client.engines.vllm_backend",
    "perennial.streams.client.publisher",
    "perennial.streams.client.subscriber",
    "perennial.streams.client.testing",
    "perennial.streams.curate.detectors",
    "perennial.streams.curate.drift",
    "perennial.streams.curate.offsets",
    "perennial.streams.observe.health",
    "perennial.streams.observe.metrics",
    "perennial.storage.objects.object_store",
    "perennial.storage.objects.keys",
    "perennial.streams.settings.loading",
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0, "the module has no example: remove it from MODULES"
    assert result.failed == 0
