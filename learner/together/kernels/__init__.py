"""What a GPU computes as single kernels."""
