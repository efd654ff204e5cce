"""Defenses, one in a file; each registers itself under `@defense`."""
