"""The demo on a real language model: it learns the facts of a made-up company, and forgets some of them."""
