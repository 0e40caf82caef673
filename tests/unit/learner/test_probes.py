"""What a version predicts after the probe texts: recorded by the learner, carried to whatever serves the same weights."""

from __future__ import annotations

import pytest
import torch

from perennial.learner.model.lora import Lora, LoraConfig
from perennial.learner.model.tokenization import ExampleTokenizer
from perennial.learner.training.probes import predicted_after
from perennial.storage.errors import IntegrityError
from perennial.storage.registry.manifest import Manifest
from perennial.streams.probe_texts import PROBE_TEXTS
from tests import tiny
from tests.unit.learner.test_update import documents, first, make, run


def test_the_most_probable_tokens_are_recorded_under_the_adapter():
    base = tiny.base()
    lora = Lora(base, LoraConfig(4, 8), "probed")
    codec = ExampleTokenizer(base.tokenizer)
    texts = {"short": "a parrot", "too-long": "x" * base.max_positions}
    lora.load({name: torch.zeros(shape) for name, shape in lora.shapes.items()})
    plain = predicted_after(texts, lora, codec)
    assert set(plain) == {"short"}
    generator = torch.Generator().manual_seed(1)
    lora.load({name: torch.randn(shape, generator=generator) for name, shape in lora.shapes.items()})
    adapted = predicted_after(texts, lora, codec)
    assert adapted != plain
    with torch.no_grad():
        whole = base.model(input_ids=torch.tensor([codec.text_ids("a parrot")])).logits[0, -1].log_softmax(-1)
    best = whole.topk(8)
    assert adapted["short"] == {
        str(token): pytest.approx(nats, abs=1e-4)
        for token, nats in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    }


def test_only_a_promoted_update_records_probes():
    updater = make()
    done = run(updater, first(updater), documents(8))
    fitting = {name for name, text in PROBE_TEXTS.items() if len(updater.codec.text_ids(text)) < 256}
    assert done.outcome == "promoted"
    assert set(done.probes) == fitting != set()
    assert done.probes == run(updater, first(updater), documents(8)).probes


def test_a_manifest_without_probes_has_the_bytes_that_it_always_had():
    from tests.unit.storage.test_gate_figures import stored_with

    stored = stored_with({})
    manifest = Manifest.from_bytes(stored)
    assert manifest.probes == {}
    assert manifest.to_bytes() == stored
    probed = manifest.model_copy(update={"probes": {"sentence-1": {"17": -0.5}}})
    assert Manifest.from_bytes(probed.to_bytes()) == probed
    assert probed.digest() != manifest.digest()
    for wrong in (b'{"x":-0.5}', b'{"17":"y"}', b"3"):
        with pytest.raises(IntegrityError):
            Manifest.from_bytes(probed.to_bytes().replace(b'{"17":-0.5}', wrong))
