"""The torch engine names what ``state_dict`` would, whoever has a say in that, and works geometry out once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from distckpt.dcp import leaves
from distckpt.engines.torch import TorchEngine
from distckpt.format.layout import held_boxes


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.register_parameter("none", None)
        self.register_buffer("mean", torch.randn(2))
        self.register_buffer("scratch", torch.randn(2), persistent=False)


class Extra(Inner):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 7}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


class Renamed(Inner):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}other"] = self.weight


def only_mean(module: nn.Module) -> None:
    """Set ``state_dict`` on one module, as recipes for adapters do."""
    module.state_dict = lambda *_, **__: {"mean": module.mean}  # type: ignore[method-assign,assignment]


def with_hook(module: nn.Module) -> None:
    def doubled(_: nn.Module, state: Any, prefix: str, __: Any) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2

    module.register_state_dict_post_hook(doubled)  # type: ignore[no-untyped-call]


def with_pre_hook(module: nn.Module) -> None:
    module.register_state_dict_pre_hook(lambda m, *_: m.mean.fill_(5))  # type: ignore[no-untyped-call]


def model_of(inner: nn.Module) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), inner, nn.BatchNorm1d(2))
    model.register_module("again", inner)
    model.register_module("absent", None)
    return model


def assert_as_torch_says(model: nn.Module) -> None:
    state, wanted = TorchEngine(model).state(optimizer=False), model.state_dict()
    found = {name: leaf.parts[0][1] for name, leaf in state.tensors.items()}
    found |= {alias: found[target] for alias, target in state.aliases.items()}
    tensors = {f"model.{key}": value for key, value in wanted.items() if isinstance(value, torch.Tensor)}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    others = {f"model.{key}": value for key, value in wanted.items() if not isinstance(value, torch.Tensor)}
    assert {name: leaf.value for name, leaf in state.objects.items()} == others


@pytest.mark.parametrize("kind", [Inner, Extra, Renamed])
def test_names_of_a_class(kind: Callable[[], nn.Module]) -> None:
    assert_as_torch_says(model_of(kind()))


@pytest.mark.parametrize("change", [with_hook, with_pre_hook])
def test_names_and_values_of_a_module_with_hooks(change: Callable[[nn.Module], None]) -> None:
    inner = Inner()
    change(inner)
    assert_as_torch_says(model_of(inner))


def test_names_of_a_model_with_a_state_dict_of_its_own() -> None:
    model = Inner()
    only_mean(model)
    state = TorchEngine(model).state(optimizer=False)
    assert list(state.tensors) == ["model.mean"]


def test_what_is_trained_is_named_also_where_it_is_tied() -> None:
    inner = Inner()
    model = model_of(inner)
    model[0].requires_grad_(False)
    engine = TorchEngine(model)
    engine.state(optimizer=False)
    assert engine.trained() == {"model.1.weight", "model.again.weight", "model.2.weight", "model.2.bias"}


def test_a_model_without_hooks_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Inner())

    def walk(*_: Any, **__: Any) -> None:
        raise AssertionError("torch's walk takes as long as all else")

    monkeypatch.setattr(nn.Module, "state_dict", walk)
    assert "model.1.weight" in TorchEngine(model).state(optimizer=False).tensors
    only_mean(model[1])
    with pytest.raises(AssertionError, match="walk"):
        TorchEngine(model).state(optimizer=False)


class FakeMesh:
    mesh = torch.arange(4)

    @staticmethod
    def get_coordinate() -> list[int]:
        return [1]


def test_what_a_rank_holds_is_worked_out_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def counted(*about: Any) -> Any:
        calls.append(about)
        return held_boxes(*about)

    monkeypatch.setattr(leaves, "held_boxes", counted)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(leaves, "_MOST_SHARES", 3)
    mesh = FakeMesh()

    def share(shape: tuple[int, ...], placement: Any) -> Any:
        return leaves._share("w", SimpleNamespace(device_mesh=mesh, placements=(placement,)), shape)  # type: ignore[arg-type]

    plain, strided = share((16, 4), Shard(0)), share((16, 4), _StridedShard(0, split_factor=2))
    assert [h.box.offsets for h in plain.held] == [(4, 0)]
    assert [h.box.offsets for h in strided.held] == [(2, 0), (10, 0)]
    assert (plain.numel, strided.numel, len(calls)) == (16, 16, 2)
    assert share((16, 4), Shard(0)) is plain
    assert share((16, 4), Shard(1)).layout.placements == ("S(1)",)
    assert len(calls) == 3
    for rows in range(5):  # shapes that come and go do not pile up
        share((rows, 4), Shard(0))
    assert len(leaves._MESHES[mesh][1]) <= 3  # type: ignore[index]
