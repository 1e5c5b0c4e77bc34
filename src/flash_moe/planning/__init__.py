"""Predicts the memory and the speed of a model, from its headers and a few measurements of the machine."""
