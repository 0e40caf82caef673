"""`perennial adapters report`: the history of an adapter as one HTML page that needs nothing else."""
