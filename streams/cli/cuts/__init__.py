"""What `perennial adapters show` says of the cuts of an adapter."""
