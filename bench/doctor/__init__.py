"""Examines a fitted defense: named tests that look for what would make its number under attack wrong."""
