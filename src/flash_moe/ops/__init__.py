"""Operations on arrays. Each op has one contract and a reference, and does not depend on files or models.

Shapes use these letters: T tokens, H hidden size, Hq/Hkv query and KV heads, D head dim, Hk/Hv DeltaNet key and value
heads of width Dk/Dv, C conv channels, E experts, K experts per token, I expert intermediate size, S context length.
"""
