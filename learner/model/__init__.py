"""The base model, LoRA on it, tokenization, losses, and the general texts that belong to a base."""
