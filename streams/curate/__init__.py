"""The curate agent: watch drift per adapter and cut examples into micro-batches."""
