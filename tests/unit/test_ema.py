"""EMAModel in one process: its arithmetic, and one test for every fault that other libraries shipped."""

from __future__ import annotations

import copy
import gc
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from distckpt import EMAModel
from distckpt.averaging.schedules import CountRatio, HalfLife, InverseGamma
from distckpt.errors import ConfigError, IncompatibleState
from distckpt.storage.direct import HUGE_PAGE


class Net(nn.Module):
    """Tied, frozen, normalised; a float buffer that is no statistic (a mixture of experts' bias), an integer one."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(8, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("expert_bias", torch.zeros(4))
        self.frozen.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.norm(self.up(self.emb(tokens)))))


AVERAGED = {"emb.weight", "up.weight", "up.bias", "norm.weight", "norm.bias"}


def drift(model: nn.Module, seed: int = 0) -> None:
    """Change every trained parameter, as a step does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def shadow(ema: EMAModel, name: str | None = None) -> dict[str, torch.Tensor]:
    found = ema.state_dict()["shadow"]
    return found if name is None else found[name]


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [n for n in wanted if not torch.equal(found[n], wanted[n])] == []


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_formula_and_its_sign(dtype: torch.dtype) -> None:
    model = Net()
    ema = EMAModel(model, decay=0.9, dtype=dtype)
    wanted = {n: p.detach().double().clone() for n, p in model.named_parameters() if n in AVERAGED}
    for seed in range(20):
        drift(model, seed)
        assert ema.update()
        for name, parameter in model.named_parameters():
            if name in AVERAGED:
                wanted[name] = 0.9 * wanted[name] + 0.1 * parameter.detach().double()
    assert shadow(ema).keys() == AVERAGED
    for name, value in shadow(ema).items():
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), wanted[name], rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


def test_it_starts_from_a_copy() -> None:
    model = Net()
    ema = EMAModel(model)
    before = {n: v for n, v in values(model).items() if n in AVERAGED}
    drift(model)
    assert_equal(shadow(ema), before)


def test_shadows_lie_side_by_side_in_huge_pages_and_are_tensors_of_their_own() -> None:
    ema = EMAModel(Net(), decay=[0.9, 0.99])
    every = [tensor for name in ("0.9", "0.99") for tensor in shadow(ema, name).values()]
    spans = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in every)
    assert spans[0][0] % HUGE_PAGE == 0
    assert all(b == a + -(-nbytes // 64) * 64 for (a, nbytes), (b, _) in pairwise(spans))
    assert {tensor.untyped_storage().nbytes() - tensor.nbytes for tensor in every} == {0}
    kept = every[-1].clone()
    del ema
    gc.collect()
    assert torch.equal(every[-1], kept)  # what anyone still has keeps the memory


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999, 0.9999])
def test_an_average_of_bf16_weights_does_not_stand_still(decay: float) -> None:
    model = nn.Linear(64, 64).bfloat16()
    start = model.weight.detach().clone()
    ema = EMAModel(model, decay=decay)
    wanted = start.double()
    for seed in range(100):
        with torch.no_grad():
            noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) * 1e-3
            model.weight.copy_(start.float() * 1.01 + noise)
        ema.update()
        wanted = wanted + (1 - decay) * (model.weight.detach().double() - wanted)
    found = shadow(ema)["weight"]
    assert found.dtype == torch.float32
    moved = (found != start.float()).double().mean()
    assert moved > 0.99
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)


def test_tied_weights_are_updated_once() -> None:
    model = Net()
    ema = EMAModel(model, decay=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    ema.reset()
    with torch.no_grad():
        model.emb.weight.fill_(1.0)
        model.up.weight.fill_(1.0)
    ema.update()
    torch.testing.assert_close(shadow(ema)["emb.weight"], torch.full((11, 6), 0.1))
    torch.testing.assert_close(shadow(ema)["up.weight"], torch.full((8, 6), 0.1))
    assert "head.weight" not in shadow(ema)
    with ema.averaged():
        assert model.head.weight is model.emb.weight


def test_every_k_steps_is_decay_to_the_k() -> None:
    model = Net()
    thin, twin = EMAModel(model, decay=0.9, every=4), copy.deepcopy(model)
    for seed in range(8):
        drift(model, seed)
        thin.update()
        if seed % 4 == 3:
            with torch.no_grad():
                for name, parameter in twin.named_parameters():
                    if name in AVERAGED:
                        parameter.lerp_(dict(model.named_parameters())[name], 1 - 0.9**4)
        if seed == 5:
            assert thin.updates == 6
    wanted = {n: p.detach() for n, p in twin.named_parameters() if n in AVERAGED}
    for name, value in shadow(thin).items():
        torch.testing.assert_close(value, wanted[name])


def test_several_averages_are_what_each_would_be_alone() -> None:
    model = Net()
    several = EMAModel(model, decay=[0.5, 0.99, 0.999], warmup=CountRatio())
    alone = {d: EMAModel(model, decay=d, warmup=CountRatio()) for d in (0.5, 0.99, 0.999)}
    for seed in range(6):
        drift(model, seed)
        several.update()
        for ema in alone.values():
            ema.update()
    assert several.names == ("0.5", "0.99", "0.999")
    assert several.decay == (0.5, 0.99, 0.999)
    for decay, ema in alone.items():
        assert_equal(shadow(several, repr(decay)), shadow(ema))
    with several.averaged(0.99):
        assert torch.equal(model.up.weight, shadow(alone[0.99])["up.weight"])
    with several.averaged("0.5"):
        assert torch.equal(model.up.weight, shadow(alone[0.5])["up.weight"])
    for wrong in (None, 0.7, "0.7"):
        with pytest.raises(ConfigError, match="which average"):
            several.apply(wrong)
    assert not several.applied


def test_start_waits_and_begins_with_a_copy() -> None:
    model = Net()
    ema = EMAModel(model, decay=0.5, start=3, warmup=HalfLife())
    for seed in range(3):
        drift(model, seed)
        ema.update()
    assert ema.updates == 0
    assert torch.equal(shadow(ema)["up.weight"], model.up.weight)
    before = model.up.weight.detach().clone()
    drift(model, 3)
    ema.update()
    assert ema.updates == 1
    assert torch.equal(shadow(ema)["up.weight"], model.up.weight)  # a half-life of 5 % of nothing
    assert not torch.equal(shadow(ema)["up.weight"], before)


# ---------------------------------------------------------------- what is averaged, what is followed


def test_buffers_and_frozen_parameters_are_the_models_own_in_a_swap() -> None:
    model = Net()
    ema = EMAModel(model, decay=0.5)
    for seed in range(3):
        model(torch.randint(0, 11, (5,)))
        drift(model, seed)
        ema.update()
    before = values(model)
    with ema.averaged():
        inside = values(model)
    assert inside["norm.num_batches_tracked"] == before["norm.num_batches_tracked"] == 3
    changed = {name for name in before if not torch.equal(before[name], inside[name])}
    assert changed == AVERAGED | {"head.weight"}


def test_averaged_buffers_leave_integers_alone() -> None:
    model = Net()
    ema = EMAModel(model, decay=0.5, buffers="average")
    start = values(model)
    model(torch.randint(0, 11, (5,)))
    with torch.no_grad():
        model.expert_bias.fill_(4.0)
    ema.update()
    assert shadow(ema).keys() == AVERAGED | {"norm.running_mean", "norm.running_var", "expert_bias"}
    torch.testing.assert_close(shadow(ema)["norm.running_mean"], (start["norm.running_mean"] + model.norm.running_mean) / 2)
    with ema.averaged():
        assert model.expert_bias.tolist() == [2.0] * 4
        assert model.norm.num_batches_tracked.dtype == torch.int64
        assert model.norm.num_batches_tracked == 1
    assert model.expert_bias.tolist() == [4.0] * 4


def test_batch_norm_can_be_refused() -> None:
    with pytest.raises(ConfigError, match=r"\['norm'\] keep BatchNorm statistics"):
        EMAModel(Net(), buffers="refuse")
    EMAModel(nn.Linear(2, 2), buffers="refuse")


def test_statistics_recomputed_inside_do_not_leak_out() -> None:
    model = Net()
    ema = EMAModel(model)
    drift(model)
    before = values(model)
    with ema.averaged():
        model(torch.randint(0, 11, (5,)))  # in training mode: running statistics and the counter move
        assert model.norm.num_batches_tracked == 1
    assert_equal(values(model), before)


def test_a_parameter_frozen_later_goes_on_being_averaged() -> None:
    model = Net()
    ema = EMAModel(model, decay=0.5)
    drift(model)
    model.up.requires_grad_(False)
    ema.update()
    ema.update()
    assert shadow(ema).keys() == AVERAGED
    with ema.averaged():
        pass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_weights_of_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(7, 5).to(dtype)), "e": nn.Parameter(torch.zeros(0, 3).to(dtype))})
    start = model["w"].detach().clone()
    ema = EMAModel(model, decay=0.5)
    with torch.no_grad():
        model["w"].add_(1)
    ema.update()
    wide = torch.promote_types(dtype, torch.float32)
    assert shadow(ema)["w"].dtype == wide
    torch.testing.assert_close(shadow(ema)["w"], (start.to(wide) + model["w"].detach().to(wide)) / 2)
    with ema.averaged():
        assert model["w"].dtype == dtype


def test_strides_are_kept() -> None:
    model = nn.Module()
    model.turned = nn.Parameter(torch.randn(4, 6).t())
    model.sliced = nn.Parameter(torch.randn(4, 6)[:, :3])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ema = EMAModel(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    ema.update()
    for name, value in shadow(ema).items():
        torch.testing.assert_close(value, before[name] * 2)
    assert shadow(ema)["turned"].stride() == model.turned.stride()


# ---------------------------------------------------------------- swapping


def test_weights_come_back_after_an_exception() -> None:
    model = Net()
    ema = EMAModel(model, decay=0.5)
    drift(model)
    before = values(model)
    inside = []

    def evaluate() -> None:
        with ema.averaged():
            inside.append(torch.equal(model.up.weight, before["up.weight"]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate()
    assert inside == [False]
    assert_equal(values(model), before)
    assert not ema.applied


def test_apply_that_fails_half_way_leaves_the_models_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    ema = EMAModel(model, decay=0.5)
    drift(model)
    before = values(model)

    def failing() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ema._weights, "written", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        ema.apply()
    assert_equal(values(model), before)
    assert not ema.applied


def test_wrong_order_of_swaps_is_refused() -> None:
    model = Net()
    ema = EMAModel(model)
    with pytest.raises(IncompatibleState, match="without apply"):
        ema.restore()
    ema.apply_shadow()
    for wrong in (ema.apply, ema.update, ema.reset, lambda: ema.load_state_dict({}), lambda: ema.leaves("ema")):
        with pytest.raises(IncompatibleState, match="restore"):
            wrong()
    with pytest.raises(IncompatibleState), ema.averaged():
        raise AssertionError("nested")
    ema.restore()
    assert ema.update()


# ---------------------------------------------------------------- names


def wrapped(kind: str, net: nn.Module) -> nn.Module:
    if kind == "compiled":
        return torch.compile(net, backend="eager")  # type: ignore[return-value]
    if kind == "data parallel":
        return nn.DataParallel(net)
    net.up = checkpoint_wrapper(net.up)
    return net


@pytest.mark.parametrize("kind", ["compiled", "data parallel", "checkpointed"])
def test_prefixes_of_wrappers_hide_nothing(kind: str) -> None:
    net = Net()
    model = wrapped(kind, net)
    ema = EMAModel(model, decay=0.5)
    assert shadow(ema).keys() == AVERAGED
    before = net.up.weight.detach().clone()
    drift(model)
    ema.update()
    torch.testing.assert_close(shadow(ema)["up.weight"], (before + net.up.weight.detach()) / 2)
    state = ema.state_dict()
    for prefix in ("", "module.", "_orig_mod.", "module._fsdp_wrapped_module."):
        other = EMAModel(Net())
        other.load_state_dict({**state, "shadow": {prefix + n: v for n, v in state["shadow"].items()}})
        assert_equal(shadow(other), shadow(ema))
        assert other.decay == 0.5
        assert other.updates == 1


@pytest.mark.parametrize("wrong", ["missing", "unexpected", "shape", "several", "no shadow", "no counts"])
def test_a_state_that_does_not_fit_changes_nothing(wrong: str) -> None:
    ema = EMAModel(Net())
    before = {n: v.clone() for n, v in shadow(ema).items()}
    state: dict[str, Any] = EMAModel(Net(), decay=[0.1, 0.2] if wrong == "several" else 0.1).state_dict()
    if wrong == "missing":
        del state["shadow"]["up.bias"]
    elif wrong == "unexpected":
        state["shadow"]["extra"] = torch.zeros(1)
    elif wrong == "shape":
        state["shadow"]["up.bias"] = torch.zeros(9)
    elif wrong == "no shadow":
        del state["shadow"]
    elif wrong == "no counts":
        del state["progress"]
    with pytest.raises(IncompatibleState, match=r"up\.bias|extra|0\.1|shadow|record"):
        ema.load_state_dict(state)
    assert_equal(shadow(ema), before)
    assert ema.decay == 0.9999


def test_nothing_to_average_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to average"):
        EMAModel(nn.Linear(2, 2).requires_grad_(False))


def test_a_model_that_changed_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    changes: dict[str, Any] = {
        r"new \['2.bias', '2.weight'\]": lambda m: m.append(nn.Linear(2, 2)),
        r"\['0.weight'\] have changed": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(3, 6))),
        r"gone \['1.bias', '1.weight'\]": lambda m: m.pop(1),
        r"gone \['0.bias'": lambda m: setattr(m[0], "bias", None),
    }
    for message, change in changes.items():
        changed = copy.deepcopy(model)
        ema = EMAModel(changed)
        change(changed)
        with pytest.raises(IncompatibleState, match=message):
            ema.update()


def test_parameters_that_were_replaced_or_moved_are_followed() -> None:
    model = nn.Linear(3, 3)
    ema = EMAModel(model, decay=0.5)
    start = model.weight.detach().clone()
    model.weight = nn.Parameter(start + 2)
    ema.update()
    torch.testing.assert_close(shadow(ema)["weight"], start + 1)
    model.weight.data = start + 5  # the same parameter, other memory
    ema.update()
    torch.testing.assert_close(shadow(ema)["weight"], start + 3)
    outer = nn.Sequential(nn.Linear(3, 3))
    ema = EMAModel(outer, decay=0.5)
    outer[0] = model  # another module of the same shapes
    first = shadow(ema)["0.weight"].clone()
    ema.update()
    torch.testing.assert_close(shadow(ema)["0.weight"], (first + start + 5) / 2)


@pytest.mark.parametrize(
    "options",
    [{"decay": 1.0}, {"decay": -0.1}, {"decay": "0.9"}, {"decay": []}, {"decay": [0.9, 0.9]}, {"dtype": torch.bfloat16},
     {"every": 0}, {"start": -1}, {"buffers": "mean"}, {"warmup": 3}, {"optimizer": 3}],
)  # fmt: skip
def test_settings_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EMAModel(nn.Linear(2, 2), **options)


# ---------------------------------------------------------------- which steps count


def test_skipped_and_micro_steps_do_not_count() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ema = EMAModel(model, decay=0.5, optimizer=optimizer)

    def step(scale: float) -> bool:
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        return ema.update()

    assert [step(s) for s in (1.0, float("inf"), 1.0, float("nan"))] == [True, False, True, False]
    assert ema.updates == 2
    assert not ema.update()  # a micro-batch: no step since
    assert torch.isfinite(shadow(ema)["weight"]).all()
    plain = EMAModel(model)
    assert not plain.update(skipped=True)
    assert plain.updates == 0
    assert plain.update()


def test_a_fused_optimizer_that_found_an_overflow_did_not_step() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ema = EMAModel(model, optimizer=optimizer)
    counted = []
    for scale in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        counted.append(ema.update())
    assert counted == [True, False, True]


def test_state_goes_through_a_state_dict_with_its_counts() -> None:
    model = Net()
    ema = EMAModel(model, decay=0.9, warmup=InverseGamma(power=0.75), every=3)
    for seed in range(4):
        drift(model, seed)
        ema.update()
    saved = copy.deepcopy(ema.state_dict())
    twin = copy.deepcopy(model)
    other = EMAModel(twin, decay=0.5, every=3)
    other.load_state_dict(saved)
    for seed in range(4, 9):
        drift(model, seed)
        drift(twin, seed)
        ema.update()
        other.update()
    assert_equal(shadow(other), shadow(ema))
    assert other.state_dict()["progress"] == ema.state_dict()["progress"]
