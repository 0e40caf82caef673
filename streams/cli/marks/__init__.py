"""`perennial marks`: show an adapter's high-water marks, and repair one that no log can have given."""
