"""Converts checkpoints to the packed form, verifies every byte, and describes checkpoints."""
