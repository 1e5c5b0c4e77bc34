"""Our own network. Activations are [T, hidden_size], without a batch dimension."""
