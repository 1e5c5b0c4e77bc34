"""What a model will need and how fast it will be, from its headers and a few measurements of the machine."""
