"""A closer look with any VLM: regions that answers rest on."""
