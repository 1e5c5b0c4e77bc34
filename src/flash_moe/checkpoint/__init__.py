"""Reads checkpoints: safetensors headers, shards, tensor names, records, and downloads."""
