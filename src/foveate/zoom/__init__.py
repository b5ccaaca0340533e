"""A closer look with any VLM: the regions that answers rest on."""
