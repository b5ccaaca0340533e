"""Scores of any VLM on a user's own questions, with everything that made them."""
