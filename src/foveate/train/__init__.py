"""Training by recipe: `recipe` reads one, `run` follows it."""
