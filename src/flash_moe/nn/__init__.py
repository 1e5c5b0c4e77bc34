"""The network, top to bottom, for one sequence: activations are [T, hidden_size], without a batch dimension."""
