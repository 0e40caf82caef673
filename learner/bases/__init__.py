"""Where a base comes from: the names of bases, GGUF files and their conversion; and the number format to compute in."""
