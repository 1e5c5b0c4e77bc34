"""Which expert bytes are where, and how they get into view."""
