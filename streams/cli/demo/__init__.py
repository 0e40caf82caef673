"""`perennial demo`: the whole loop on real text, with a report."""
