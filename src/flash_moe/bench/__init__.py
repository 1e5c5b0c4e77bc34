"""Measurements: how fast this machine reads experts, and how fast it runs a model."""
