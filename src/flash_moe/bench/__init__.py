"""Measures the speed of expert reads and of a model on this machine."""
