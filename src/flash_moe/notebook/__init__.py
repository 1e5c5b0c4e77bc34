"""Displays in a notebook: HTML, a stream while it is generated, pictures."""
