"""The default K is a number like any other once it is resolved: GPU kernels take plain integers alone."""

from flash_moe.checks import DEFAULT_EXPERTS_PER_TOKEN, resolve_experts_per_token


def test_the_resolved_default_is_a_plain_int() -> None:
    assert type(resolve_experts_per_token(DEFAULT_EXPERTS_PER_TOKEN, 10)) is int
    assert type(resolve_experts_per_token(DEFAULT_EXPERTS_PER_TOKEN, 2)) is int
    assert type(resolve_experts_per_token(None, 10)) is int
