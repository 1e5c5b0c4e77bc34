"""Names and bytes on disk: safetensors headers, shards, name mapping, records, packing."""
