"""Kernels that prove themselves on the user's own GPU before they are used."""
