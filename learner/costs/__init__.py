"""What updates use of the device: seconds, joules and floating-point operations."""
