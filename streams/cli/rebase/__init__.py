"""The command `perennial adapters rebase`: learn an adapter anew on another base."""
