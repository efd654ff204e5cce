"""How jobs run: scheduled on slots, each done from its description alone."""
