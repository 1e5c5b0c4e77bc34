"""Tests kernels on the user's own GPU before they are used."""
