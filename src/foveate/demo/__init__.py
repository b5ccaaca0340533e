"""A page in the browser: ask models about a picture, and see where they looked."""
