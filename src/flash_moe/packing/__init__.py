"""Checkpoints as files: converting to the packed form, verifying every byte, describing what is there."""
