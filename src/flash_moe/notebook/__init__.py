"""How things look in a notebook: HTML, a stream while it is written, pictures."""
