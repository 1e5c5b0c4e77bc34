"""Predicts a model's needs and speed, from its headers and a few measurements of the machine."""
