"""Foveate inside programs that people already run; each loads its module here through an entry point."""
