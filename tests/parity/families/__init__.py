"""One file per method: its name is the beginning of the cases' names, it defines `FAMILY`."""
