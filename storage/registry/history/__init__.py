"""The history index: compact pages of an adapter's versions and of the examples in their micro-batches."""
