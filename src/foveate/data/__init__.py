"""Training data: `formats` reads conversations, `dataset` turns them into model inputs, `toy` makes some."""
