"""From a prompt to tokens: prefill, decode, sampling, stopping, statistics."""
