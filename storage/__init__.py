"""Objects, manifests and the registry of adapter versions; imports nothing else of the project."""
