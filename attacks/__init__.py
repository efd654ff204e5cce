"""Attacks, one in a file; each registers itself under `@attack`."""
