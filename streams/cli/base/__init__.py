"""`perennial base`: the bases that can be used, their import, and what suits one on this machine."""
