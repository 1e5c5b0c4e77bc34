"""Displays in a notebook: HTML, streams during the generation, and plots."""
