"""The frozen base, LoRA layers on it, tokenization, losses, general texts and determinism."""
