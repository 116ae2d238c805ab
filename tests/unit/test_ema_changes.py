"""EMAModel where the model changes under it: layouts, ties, freezing, buffers; and what a refused call leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from distckpt import EMAModel
from distckpt.averaging.live import LiveWeights
from distckpt.averaging.outer import ANCHOR, MOMENTUM, OuterStep
from distckpt.averaging.schedules import CountRatio
from distckpt.errors import ConfigError, IncompatibleState


def drift(model: nn.Module, seed: int) -> None:
    """Change every trained parameter by values that do not depend on its strides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))


def shadow(ema: EMAModel) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = ema.state_dict()["shadow"]
    return found


class Reference:
    """The formula, by hand."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.values = {n: p.detach().double().contiguous().clone() for n, p in model.named_parameters()}

    def update(self) -> None:
        for name, parameter in self.model.named_parameters():
            self.values[name] += (1 - self.decay) * (parameter.detach().double() - self.values[name])

    def check(self, ema: EMAModel) -> None:
        found = shadow(ema)
        assert found.keys() == self.values.keys()
        for name, value in self.values.items():
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- strides and dtypes


def to_channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def to_channels_last_and_back(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)
    model.to(memory_format=torch.contiguous_format)


def assigned_turned(model: nn.Module) -> None:
    turned = {n: v.movedim(0, -1).contiguous().movedim(-1, 0) for n, v in model.state_dict().items()}
    assert any(not v.is_contiguous() for v in turned.values())
    model.load_state_dict(turned, assign=True)


def assigned_with_gaps(model: nn.Module) -> None:
    gaps = {n: torch.stack((v, v), -1)[..., 0] for n, v in model.state_dict().items()}
    model.load_state_dict(gaps, assign=True)


def to_double(model: nn.Module) -> None:
    model.double()


@pytest.mark.parametrize("again", [True, False], ids=["updated", "looked at"])
@pytest.mark.parametrize(
    "change", [to_channels_last, to_channels_last_and_back, assigned_turned, assigned_with_gaps, to_double]
)
def test_an_average_keeps_its_values_when_weights_lie_otherwise(
    change: Callable[[nn.Module], None], again: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1), nn.Linear(4, 6))
    ema, wanted = EMAModel(model, decay=0.75), Reference(model, decay=0.75)
    for seed in range(3):
        drift(model, seed)
        ema.update()
        wanted.update()
    change(model)
    if not again:
        wanted.check(ema)
    for seed in range(3, 6):
        drift(model, seed)
        ema.update()
        wanted.update()
    wanted.check(ema)
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    with ema.averaged():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach().double(), wanted.values[name], rtol=1e-5, atol=1e-6)
        to_channels_last(model)
    assert all(torch.equal(p, own[n]) for n, p in model.named_parameters())
    wanted.check(ema)
    leaves = ema.leaves("ema").tensors
    assert all(str(part.dtype) == f"torch.{leaf.dtype}" for leaf in leaves.values() for _, part in leaf.parts)


def test_only_the_shadows_of_changed_weights_get_memory_anew() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(4, 6))
    ema = EMAModel(model)
    before = {n: v.data_ptr() for n, v in shadow(ema).items()}
    to_channels_last(model)
    after = {n: v.data_ptr() for n, v in shadow(ema).items()}
    assert {n for n in before if before[n] != after[n]} == {"0.weight"}


def test_an_outer_step_keeps_anchor_and_momentum_when_weights_lie_otherwise() -> None:
    model = nn.Conv2d(3, 5, 3)
    outer = OuterStep(model)
    with torch.no_grad():
        for number in (ANCHOR, MOMENTUM):
            outer._shadows.parts["weight"][0].views[number].copy_(torch.arange(135.0).view(5, 3, 3, 3) + number)
    to_channels_last(model)
    state = outer.state_dict()
    assert torch.equal(state["anchor"]["weight"], torch.arange(135.0).view(5, 3, 3, 3))
    assert torch.equal(state["momentum"]["weight"], torch.arange(135.0).view(5, 3, 3, 3) + 1)


# ---------------------------------------------------------------- ties


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.emb.weight


def test_weights_that_became_tied_are_refused_by_name() -> None:
    model = Tied(tied=False)
    ema = EMAModel(model)
    own, model.head.weight = model.head.weight, model.emb.weight
    for call in (ema.update, ema.apply, ema.state_dict, ema.reset):
        with pytest.raises(IncompatibleState, match=r"tied \['head.weight to emb.weight'\].*anew after tying"):
            call()
    model.head.weight = own
    assert ema.update()


def test_weights_that_became_untied_are_refused_until_they_are_tied_again() -> None:
    model = Tied(tied=True)
    ema = EMAModel(model, decay=0.5)
    start = model.emb.weight.detach().clone()
    model.load_state_dict({n: v + 2 for n, v in model.state_dict().items()}, assign=True)
    with pytest.raises(IncompatibleState, match=r"untied \['head.weight from emb.weight'\]"):
        ema.update()
    model.head.weight = model.emb.weight
    ema.update()
    torch.testing.assert_close(shadow(ema), {"emb.weight": start + 1})


# ---------------------------------------------------------------- freezing


def test_a_parameter_that_is_unfrozen_joins_as_a_copy() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False).requires_grad_(False))
    ema = EMAModel(model, decay=0.5)
    drift(model, 0)
    ema.update()
    assert shadow(ema).keys() == {"0.weight", "0.bias"}
    model[1].requires_grad_(True)
    drift(model, 1)
    ema.update()
    first = model[1].weight.detach().clone()
    assert torch.equal(shadow(ema)["1.weight"], first)
    drift(model, 2)
    ema.update()
    torch.testing.assert_close(shadow(ema)["1.weight"], (first + model[1].weight.detach()) / 2)
    own = model[1].weight.detach().clone()
    with ema.averaged():
        assert torch.equal(model[1].weight, shadow_of(ema, "1.weight"))
    assert torch.equal(model[1].weight, own)
    assert "ema.1.weight" in ema.settled("ema")


def shadow_of(ema: EMAModel, name: str) -> torch.Tensor:
    return ema._shadows.parts[name][0].views[0]


def test_unfreezing_while_averaged_weights_are_in_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    ema = EMAModel(model, decay=0.5)
    drift(model, 0)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with ema.averaged():
        model.requires_grad_(True)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert shadow(ema).keys() == before.keys()


def test_an_outer_step_refuses_a_parameter_that_is_unfrozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    outer = OuterStep(model)
    model[1].weight.requires_grad_(True)
    for call in (outer.state_dict, lambda: outer.leaves("outer"), outer.reset):
        with pytest.raises(IncompatibleState, match=r"\['1.weight'\] were frozen .* make it anew after unfreezing"):
            call()
    model[1].weight.requires_grad_(False)
    assert outer.state_dict()["anchor"].keys() == {"0.weight", "0.bias"}


# ---------------------------------------------------------------- buffers in a swap


def other_objects(model: nn.Module) -> None:
    model.norm._buffers = {name: buffer.clone() for name, buffer in model.norm._buffers.items()}


def to_wider(model: nn.Module) -> None:
    model.double()  # makes other objects of floating-point buffers


def resized(model: nn.Module) -> None:
    model.norm.running_mean = torch.ones(7)


@pytest.mark.parametrize("change", [other_objects, to_wider, resized])
def test_buffers_that_were_replaced_while_averaged_weights_were_in_the_model_come_back(
    change: Callable[[nn.Module], None],
) -> None:
    model = nn.Module()
    model.norm = nn.BatchNorm1d(4)
    ema = EMAModel(model)
    model.norm(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with ema.averaged():
        change(model)
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.add_(3)
    after = model.state_dict()
    assert all(torch.equal(after[name].to(value.dtype), value) for name, value in before.items())
    model.norm(torch.randn(5, 4).to(model.norm.weight))


# ---------------------------------------------------------------- what is refused changes nothing


def test_an_update_that_is_refused_does_not_count() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = EMAModel(model, decay=0.5, start=1, warmup=CountRatio(), optimizer=optimizer)
    for _ in range(2):
        optimizer.step()
        ema.update()
    optimizer.step()
    before = copy.deepcopy(ema.state_dict())
    bias, model.bias = model.bias, None
    for _ in range(2):
        with pytest.raises(IncompatibleState, match=r"gone \['bias'\]"):
            ema.update()
    model.bias = bias
    after = ema.state_dict()
    assert after["progress"] == before["progress"]
    torch.testing.assert_close(after["shadow"], before["shadow"], rtol=0, atol=0)
    assert ema.update()  # the step is still to be taken in, once
    assert not ema.update()
    assert ema.updates == 2
    optimizer.step()
    assert not ema.update(skipped=True)
    assert not ema.update()


@pytest.mark.parametrize("key", ["averages", "seen", "start", "schedule", "pending"])
@pytest.mark.parametrize("how", ["missing", "wrong"])
def test_a_record_that_lacks_a_key_is_refused_by_its_name(key: str, how: str) -> None:
    ema = EMAModel(nn.Linear(2, 2), decay=0.5)
    state = copy.deepcopy(ema.state_dict())
    place = state["progress"]["averages"][""] if key in ("schedule", "pending") else state["progress"]
    if how == "missing":
        del place[key]
    else:
        place[key] = "1"
    with pytest.raises(IncompatibleState, match=f"lacks .*{key}"):
        ema.load_state_dict(state)
    with pytest.raises(IncompatibleState, match=f"lacks .*{key}"):
        ema.take_over("ema", state["progress"], [], [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_reset_leaves_a_diverged_average_behind(bad: float, device: str | None) -> None:
    model = nn.Linear(2, 2)
    ema = EMAModel(model, decay=[0.5, 0.9], device=device)
    good = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model.weight.fill_(bad)
    ema.update()
    model.load_state_dict(good)
    ema.reset()
    for average in ema.state_dict()["shadow"].values():
        torch.testing.assert_close(average, good, rtol=0, atol=0)


# ---------------------------------------------------------------- names, and before the start


def test_a_single_average_is_called_by_its_decay_too() -> None:
    model = nn.Linear(2, 2)
    ema = EMAModel(model, decay=0.999)
    drift(model, 0)
    ema.update()
    for name in (None, "", 0.999, "0.999"):
        with ema.averaged(name):
            assert torch.equal(model.weight, shadow_of(ema, "weight"))
    with pytest.raises(ConfigError, match=r"which average\? 0.99 is none of \['0.999'\]"):
        ema.apply(0.99)
    assert not ema.applied


@pytest.mark.parametrize("decay", [0.5, [0.5, 0.9]])
def test_until_the_start_the_average_in_a_state_dict_is_the_weights(decay: float | list[float]) -> None:
    model = nn.Linear(2, 2)
    ema = EMAModel(model, decay=decay, start=3)
    for seed in range(3):
        drift(model, seed)
        state = ema.state_dict()["shadow"]
        for average in [state] if isinstance(decay, float) else state.values():
            torch.testing.assert_close(average, {n: p.detach() for n, p in model.named_parameters()}, rtol=0, atol=0)
        ema.update()
    assert ema.updates == 0
    own = model.weight.detach().clone()
    drift(model, 3)
    assert torch.equal(shadow_of(ema, "weight"), own)
    ema.update()
    torch.testing.assert_close(shadow_of(ema, "weight"), (own + model.weight.detach()) / 2)


@pytest.mark.parametrize("collective", [True, False])
def test_an_error_is_told_before_the_others_are_waited_for(
    collective: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under ZeRO: the error itself comes up only once all ranks have their weights back, or the group's time is over."""
    ema = EMAModel(nn.Linear(2, 2))
    told: list[str] = []
    monkeypatch.setattr(LiveWeights, "collective", collective)

    def evaluate() -> None:
        monkeypatch.setattr(LiveWeights, "written", lambda weights: told.append(caplog.text))
        raise ZeroDivisionError("a bad batch")

    with pytest.raises(ZeroDivisionError), ema.averaged():
        evaluate()
    assert ["a bad batch" in text for text in told] == [collective]
    assert not ema.applied
