"""Many adapters in one pass: rows of several adapters packed into one row, LoRA as stacked tensors."""
