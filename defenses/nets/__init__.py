"""Networks that several defenses share."""
