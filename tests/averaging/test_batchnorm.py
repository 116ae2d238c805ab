"""BatchNorm in averages: refused, copied on purpose, or recomputed over data, on any number of ranks, on a copy."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from averaging_support import contents, root, step_of
from ranks import run_ranks
from torch import nn

from distckpt import average_checkpoints
from distckpt.averaging.average import RecomputeBatchNorm
from distckpt.averaging.batchnorm import recompute_batchnorm
from distckpt.averaging.soup import greedy_soup
from distckpt.averaging.sources import Term, open_members
from distckpt.dcp.agreement import Agreement
from distckpt.engines import rng
from distckpt.engines.accelerator import Accelerator
from distckpt.errors import ConfigError, IncompatibleState


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(4, 3)
        self.last = nn.BatchNorm1d(3, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.out(self.drop(self.norm(self.conv(x))).mean(2)))


def trained(number: int) -> Net:
    torch.manual_seed(number)
    net = Net()
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 2)
    for _ in range(5):
        net(torch.randn(16, 2, 9) * (number + 1) + number)
    return net.eval()


def data(count: int = 6) -> list[torch.Tensor]:
    torch.manual_seed(99)
    return [torch.randn(8, 2, 9) * 2 + 4 * i for i in range(count)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return root(tmp_path_factory.mktemp("bn") / "run", [trained(i).state_dict() for i in range(3)])


def test_statistics_that_differ_are_refused_by_name(tmp_path: Path, run: Path) -> None:
    with pytest.raises(IncompatibleState, match=r"model\.last\.running_mean.*model\.norm\.running_var"):
        average_checkpoints(run, tmp_path / "out")
    frozen = trained(0).state_dict()
    same = root(tmp_path / "same", [frozen | {"out.weight": torch.ones(3, 4) * i} for i in range(3)])
    average_checkpoints(same, tmp_path / "frozen")  # frozen statistics are constants
    average_checkpoints([step_of(run, 2)], tmp_path / "single")  # one checkpoint is no average


def test_the_newests_are_taken_on_purpose_only(tmp_path: Path, run: Path) -> None:
    report = average_checkpoints(run, tmp_path / "out", batchnorm="copy_newest")
    found, newest = contents(tmp_path / "out"), trained(2).state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(found[f"norm.{name}"], newest[f"norm.{name}"])
    assert not torch.equal(found["norm.weight"], newest["norm.weight"])
    assert any("BatchNorm statistics of the newest" in note for note in report.notes)
    with pytest.raises(ConfigError, match="batchnorm='average'"):
        average_checkpoints(run, tmp_path / "none", batchnorm="average")


def statistics_by_hand(state: dict[str, torch.Tensor], batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return mean and variance of all data at the first layer, in one piece."""
    net = Net()
    net.load_state_dict(state)
    with torch.no_grad():
        values = net.conv(torch.cat(batches)).double().transpose(0, 1).reshape(4, -1)
    return {"norm.running_mean": values.mean(1).float(), "norm.running_var": values.var(1).float()}


def test_recomputed_statistics_are_those_of_all_data(tmp_path: Path, run: Path) -> None:
    model = trained(7).train(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches, random = data(), torch.get_rng_state()
    average_checkpoints(run, tmp_path / "out", batchnorm=RecomputeBatchNorm(model, batches))
    after = torch.get_rng_state()
    found = contents(tmp_path / "out")
    for name, value in statistics_by_hand(found, data()).items():
        assert torch.allclose(found[name], value, rtol=1e-5), name
    assert found["norm.num_batches_tracked"] == 6
    assert found["last.running_var"].shape == (3,)
    # A mean of batches' variances would lack the spread between batches, whose means lie apart.
    apart = torch.stack([statistics_by_hand(found, [batch])["norm.running_var"] for batch in data()]).mean(0)
    assert (found["norm.running_var"] > 1.2 * apart).any()
    # The live model is as it was: weights, statistics, mode, hooks, and no random number was drawn.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert not model.norm._forward_pre_hooks
    assert torch.equal(after, random)


def on_ranks(rank: int, run: Path, out: Path, world: int) -> None:
    torch.manual_seed(0)
    share = data()[rank::world]
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Net()) if world == 3 else Net()
    model.drop.p = 0.0
    average_checkpoints(run, out, batchnorm=RecomputeBatchNorm(model, share), timeout_s=20.0)


def test_ranks_count_their_own_share_and_agree(tmp_path: Path, run: Path) -> None:
    """Uneven shares: 6 batches on 4 ranks; with SyncBatchNorm too, whose collectives would hang there."""
    found = []
    for world in (1, 2, 3):
        run_ranks(world, on_ranks, run, tmp_path / f"{world}", world)
        found.append(contents(tmp_path / f"{world}"))
    for other in found[1:]:
        assert other["norm.num_batches_tracked"] == 6
        for name in ("norm.running_mean", "norm.running_var", "last.running_mean", "last.running_var"):
            assert torch.allclose(other[name], found[0][name], rtol=1e-5, atol=1e-6), name


def test_what_cannot_be_counted_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ConfigError, match=r"no data reached BatchNorm last, norm"):
        average_checkpoints(run, tmp_path / "a", batchnorm=RecomputeBatchNorm(Net(), []))
    with pytest.raises(IncompatibleState, match="does not fit the model"):
        average_checkpoints(run, tmp_path / "b", batchnorm=RecomputeBatchNorm(nn.BatchNorm1d(4), data()))

    class Instance(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)  # type: ignore[assignment]

    with pytest.raises(ConfigError, match=r"no BatchNorm for model\.norm\.running_mean"):
        average_checkpoints(run, tmp_path / "c", batchnorm=RecomputeBatchNorm(Instance(), data()))


def test_a_models_own_statistics_without_an_average() -> None:
    model = trained(1)
    found = recompute_batchnorm(
        RecomputeBatchNorm(model, data()), agreement=Agreement(None, 0, 1, timeout_s=5), timeout_s=5
    )
    assert set(found) == {f"{layer}.{part}" for layer in ("norm", "last")
                          for part in ("running_mean", "running_var", "num_batches_tracked")}  # fmt: skip


def counted(model: nn.Module, batches: Any) -> dict[str, torch.Tensor]:
    alone = Agreement(None, 0, 1, timeout_s=5)
    return recompute_batchnorm(RecomputeBatchNorm(model, batches), agreement=alone, timeout_s=5)


class FakeCuda:
    """Stands in for ``torch.cuda``: one device with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def device_count(self) -> int:
        return 1

    def get_rng_state(self, index: int) -> torch.Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: torch.Tensor, index: int) -> None:
        self.generator.set_state(state)


def test_every_generator_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout on a device that nobody named (the model is there already), shuffles and augmentations of the batches."""
    cuda = FakeCuda()
    monkeypatch.setattr(rng, "current_accelerator", lambda: Accelerator("cuda", cuda))
    monkeypatch.setattr(Accelerator, "current", 0)

    def augmented(batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for batch in batches:
            noise = torch.randn(8, 2, 9) + torch.randn(1, generator=cuda.generator)
            yield batch * random.random() + float(np.random.rand()) + noise

    model, batches = trained(1), data()
    before = rng.capture_rng()
    counted(model, augmented(batches))
    after = rng.capture_rng()
    assert after["devices"] == before["devices"]
    assert (after["torch"], after["python"]) == (before["torch"], before["python"])
    assert after["numpy"]["state"]["pos"] == before["numpy"]["state"]["pos"]
    assert np.array_equal(after["numpy"]["state"]["key"], before["numpy"]["state"]["key"])


class Outer(nn.Module):
    """A model whose own child is called ``module``: no wrapper, for its forward pass does more."""

    def __init__(self) -> None:
        super().__init__()
        self.module = trained(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x * 10)  # type: ignore[no-any-return]


def test_a_child_called_module_makes_no_wrapper() -> None:
    found = counted(Outer(), data())
    wanted = counted(trained(1), [batch * 10 for batch in data()])
    assert found.keys() == wanted.keys()
    assert torch.equal(found["norm.running_mean"], wanted["norm.running_mean"])


def wrapped_in_ddp(rank: int) -> dict[str, torch.Tensor]:
    return counted(torch.compile(nn.parallel.DistributedDataParallel(trained(1))), data())  # type: ignore[arg-type]


def test_wrappers_are_taken_off() -> None:
    wanted = counted(trained(1), data())
    wrappers = [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile]
    found = [counted(wrap(trained(1)), data()) for wrap in wrappers]  # type: ignore[operator]
    for one in (*found, *run_ranks(1, wrapped_in_ddp)):
        assert one.keys() == wanted.keys()
        assert torch.equal(one["norm.running_mean"], wanted["norm.running_mean"])


def test_soups_are_scored_with_their_own_statistics(run: Path) -> None:
    members = open_members([Term(str(step_of(run, i))) for i in (1, 2, 3)])
    seen = []

    def score(blend: object) -> float:
        seen.append(blend.state_dict()["norm.running_var"])  # type: ignore[attr-defined]
        return 1.0

    soup = greedy_soup(members, score, mode="max", batchnorm=RecomputeBatchNorm(Net(), data()))
    assert len(soup.members) == 3
    stored = [trained(i).state_dict()["norm.running_var"] for i in range(3)]
    assert [any(torch.equal(one, other) for other in stored) for one in seen] == [True] * 3 + [False] * 2
