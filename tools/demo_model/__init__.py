"""The demo model: a small Qwen3.5-MoE model trained from scratch that ships with the library."""
