"""Several machines: each holds and reads its share of the experts, and one sum per layer adds what they computed.

Nothing here knows of files, networks or text. Rank 0 drives: it tells the others what to run; they follow.
"""
