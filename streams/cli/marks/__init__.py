"""`perennial marks`: show an adapter's high-water marks, and lower one beyond the end of its log."""
