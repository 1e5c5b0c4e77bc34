"""Attributes of a module are the arrays that MLX's own functions see."""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten

from flash_moe.nn.module import Module


class Inner(Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.zeros(2)


class Outer(Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.layers, self.bias = Inner(), [Inner()], None


def test_attributes_are_parameters() -> None:
    module = Outer()
    assert [name for name, _ in tree_flatten(module.parameters())] == ["inner.weight", "layers.0.weight"]
    assert module.inner.weight is module["inner"]["weight"]
    assert "inner" in vars(module)  # where Python looks first


def test_what_mlx_updates_is_what_the_attribute_gives() -> None:
    module = Outer()
    module.update({"inner": {"weight": mx.ones(2)}, "layers": [{"weight": mx.full(2, 3.0)}]})
    assert module.inner.weight.tolist() == [1.0, 1.0]
    assert module.layers[0].weight.tolist() == [3.0, 3.0]
    module.apply(lambda array: array.astype(mx.float16))
    assert module.inner.weight.dtype == mx.float16


def test_attributes_change_their_kind_and_go() -> None:
    module = Outer()
    module.bias = mx.ones(1)
    assert module.bias is module["bias"]
    module.bias = None
    assert module.bias is None
    assert "bias" not in module
    del module.inner.weight
    assert not hasattr(module.inner, "weight")
    assert "inner.weight" not in dict(tree_flatten(module.parameters()))


def test_a_cleared_module_holds_nothing() -> None:
    module = Outer()
    module.clear()
    assert not module
    assert not hasattr(module, "inner")
    assert not hasattr(module, "layers")
