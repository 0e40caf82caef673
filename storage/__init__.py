"""Objects and the registry of adapter versions. Imports nothing else of the project."""
