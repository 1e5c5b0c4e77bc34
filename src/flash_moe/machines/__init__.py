"""Runs a model on several machines. Each holds a share of the experts, and one sum per layer adds their outputs.

This package does not depend on files, networks or text. Rank 0 leads: it sends commands to the other ranks, which
follow.
"""
