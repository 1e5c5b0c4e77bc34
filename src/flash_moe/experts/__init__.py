"""The records of experts: where their bytes are, and how they are fetched."""
