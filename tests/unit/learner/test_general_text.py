"""General texts: found without running any source, each in one split for good."""

from perennial.learner.model.general_text import MIN_TEXT_CHARS, docstrings_of, general_texts, split_of


def test_general_texts_are_split_once_and_for_all():
    splits = {name: general_texts(name) for name in ("train", "heldout", "anchor")}
    sizes = {name: len(texts) for name, texts in splits.items()}
    total = sum(sizes.values())
    assert sizes["train"] > 0.85 * total
    assert min(sizes["heldout"], sizes["anchor"]) > 0.03 * total
    every = [text for texts in splits.values() for text in texts]
    assert len(set(every)) == len(every)
    assert min(map(len, every)) >= MIN_TEXT_CHARS
    assert all(split_of(text) == name for name, texts in splits.items() for text in texts)
    splits["train"].clear()
    assert len(general_texts("train")) == sizes["train"]


def test_docstrings_are_found_by_name_without_running_the_source():
    source = b'''"""Module text."""
raise SystemExit
class A:
    """Class text.

        Indented.
    Not indented.
    """
    def f(self):
        """Method text."""
try:
    def g():
        """Guarded text."""
except ImportError:
    def g():
        """Fallback text."""
'''
    assert list(docstrings_of(source, "m")) == [
        ("m", "Module text."),
        ("m.A", "Class text.\n\n    Indented.\nNot indented."),
        ("m.A.f", "Method text."),
        ("m.g", "Guarded text."),
        ("m.g", "Fallback text."),
    ]
