"""`perennial economics`: what the updates of an adapter cost, and what else the same knowledge would cost."""
