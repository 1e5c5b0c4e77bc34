"""Generates tokens from a prompt: prefill, decode, sampling, stopping, statistics."""
