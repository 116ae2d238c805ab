"""Post-hoc EMA: what is synthesised from two tracked profiles, against one tracked directly and against ema-pytorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import run as cli
from cli_support import run_json as cli_json
from manager_support import manager
from ranks import run_ranks

from distckpt import EMAModel, open_checkpoint
from distckpt.averaging.average import Options
from distckpt.averaging.posthoc import (
    PostHocEMA,
    Snapshot,
    average_posthoc,
    combined,
    profile_products,
    snapshots,
    solve_weights,
    synthesise,
)
from distckpt.averaging.schedules import gamma_of
from distckpt.averaging.structure import Rules
from distckpt.errors import CheckpointNotFound, ConfigError, IncompatibleState

WIDTHS = (0.05, 0.1)
STEPS, EVERY = 200, 10


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(7, 5)
        self.norm = torch.nn.BatchNorm1d(5)
        self.frozen = torch.nn.Linear(5, 7).requires_grad_(False)
        self.tied = torch.nn.Linear(7, 5, bias=False)
        self.tied.weight = self.up.weight


def walk(model: torch.nn.Module, step: int) -> None:
    """Take a step of a random walk with a trend; the norm's counter moves too."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05 + 0.01)
        model.norm.num_batches_tracked += 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[float, dict[str, torch.Tensor]], torch.nn.Module]:
    """Return a root with snapshots, averages of other widths that were tracked directly, and the model."""
    root = tmp_path_factory.mktemp("posthoc")
    model = Net()
    ema, direct = PostHocEMA(model), PostHocEMA(model, sigma_rel=[0.03, 0.07, 0.15, 0.2], dtype=torch.float64)
    with manager(root, model, stateful={"ema": ema}, save_total_limit=None) as m:
        for step in range(1, STEPS + 1):
            walk(model, step)
            ema.update()
            direct.update()
            if step % EVERY == 0:
                m.save(step=step)
    return root, {float(n): v for n, v in direct.state_dict()["shadow"].items()}, model


def discrete(count: int, sigma_rel: float) -> Any:
    """Return the weight of each of STEPS steps in an average over the first ``count``."""
    out = np.zeros(STEPS)
    out[:count] = np.diff((np.arange(count + 1) / count) ** (gamma_of(sigma_rel) + 1))
    return out


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.2])
def test_a_synthesised_average_is_the_directly_tracked_one_within_its_fit_error(run: Any, sigma_rel: float) -> None:
    root, direct, _ = run
    found, how = synthesise(root, sigma_rel)
    assert sum(how.weights) == pytest.approx(1.0)
    assert how.count == STEPS
    # The weighting of single steps that results, against the one asked for: what the fit error says, it is.
    got = sum(w * discrete(s.count, s.sigma_rel) for s, w in zip(how.snapshots, how.weights, strict=True))
    wanted = discrete(STEPS, sigma_rel)
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) == pytest.approx(how.fit_error, rel=0.05)
    assert how.fit_error < 0.09
    # An average differs by at most the misplaced weight times how far the weights have ever been apart.
    for name in ("up.weight", "norm.bias"):
        spread = STEPS * 0.01 + 0.05 * 5 * STEPS**0.5
        error = (found[name].double() - direct[sigma_rel][name]).abs().max()
        assert error <= np.abs(got - wanted).sum() * spread + 1e-5
        assert error < 0.1


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_a_tracked_width_is_given_back_exactly(run: Any, sigma_rel: float) -> None:
    root, _, _ = run
    found, how = synthesise(root, sigma_rel)
    assert how.fit_error < 1e-6
    stored = open_checkpoint(root).state_dict(f"ema.{sigma_rel}.")
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def test_the_command_writes_it_and_tells_the_fit_error(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, direct, model = run
    command = ["average", root, "--out", tmp_path / "out", "--posthoc", "--sigma-rel", 0.07]
    code, out, err = cli(capsys, *command)
    assert code == 0, err
    wanted, how = synthesise(root, 0.07)
    assert f"relative width 0.07 over {STEPS} steps, fit error {100 * how.fit_error:.2g} %" in out
    written = open_checkpoint(tmp_path / "out")
    assert written.verify("full").ok
    found = written.state_dict("model.")
    assert found.keys() == wanted.keys()
    assert found["norm.num_batches_tracked"] == STEPS
    for name in ("up.weight", "up.bias", "norm.weight", "norm.bias", "frozen.weight"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-6)
    error = (found["up.weight"].double() - direct[0.07]["up.weight"]).abs().max()
    assert error < 0.1
    Net().load_state_dict(found)
    assert written.provenance["fit"]["fit_error"] == pytest.approx(how.fit_error)
    code, document = cli_json(capsys, *command[:3], tmp_path / "early", *command[4:], "--at", 100)
    assert (code, document["step"], document["fit"]["count"]) == (0, 100, 100)
    assert max(row["step"] for row in document["members"]) == 100
    for wrong in (["--method", "last"], ["--steps", "100"], ["--prefix", "ema."]):
        assert cli(capsys, *command, *wrong)[0] == 2
    assert cli(capsys, *command[:4], "--sigma-rel", 0.07)[0] == 2
    assert cli(capsys, *command[:5])[0] == 2
    assert cli(capsys, *command, "--name", "other")[0] == 1


def write_posthoc(rank: int, root: Path, out: Path) -> list[float]:
    options = Options(rules=Rules(batchnorm="copy_newest"), timeout_s=30.0, threads=1)
    report = average_posthoc(root, out, 0.07, options=options)
    assert report.fit is not None
    return [float(report.fit["fit_error"]), report.nbytes]


def test_ranks_share_it_and_have_the_same_bits(run: Any, tmp_path: Path) -> None:
    alone = run_ranks(1, write_posthoc, run[0], tmp_path / "1")
    assert run_ranks(2, write_posthoc, run[0], tmp_path / "2") == alone * 2
    one, two = (open_checkpoint(tmp_path / n).state_dict("") for n in "12")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_only_followed_comes_from_the_newest_and_ties_stay(run: Any) -> None:
    root, _, model = run
    found, _ = synthesise(root, 0.07)
    assert found.keys() == model.state_dict().keys()
    assert found["norm.num_batches_tracked"] == STEPS
    assert torch.equal(found["frozen.weight"], model.frozen.weight)
    assert found["tied.weight"] is found["up.weight"]
    Net().load_state_dict(found)


def test_blocks_are_small_and_make_no_difference(run: Any) -> None:
    root, _, _ = run
    found, how = synthesise(root, 0.07)
    seen: dict[str, int] = {}
    for fqn, box, values in combined(how, block=3):
        assert values.numel() <= 3
        assert torch.equal(found[fqn][box.slices], values)
        seen[fqn] = seen.get(fqn, 0) + values.numel()
    assert seen == {n: found[n].numel() for n in ("up.weight", "up.bias", "norm.weight", "norm.bias")}


def test_an_earlier_end_uses_no_later_snapshot(run: Any) -> None:
    root, _, _ = run
    _, how = synthesise(root, 0.07, step=100)
    assert max(s.step for s in how.snapshots) == how.count == 100
    with pytest.raises(ConfigError, match="snapshots are at steps"):
        synthesise(root, 0.07, step=105)


def test_profiles_and_solution_agree_with_ema_pytorch(run: Any) -> None:
    oracle = pytest.importorskip("ema_pytorch.post_hoc_ema")
    root, _, _ = run
    found = snapshots(root)
    times = torch.tensor([float(s.count) for s in found]).double()
    gammas = torch.tensor([oracle.sigma_rel_to_gamma(s.sigma_rel) for s in found]).double()
    assert gammas.tolist() == pytest.approx([gamma_of(s.sigma_rel) for s in found])
    for sigma_rel in (0.03, 0.07, 0.15):
        target = torch.tensor([oracle.sigma_rel_to_gamma(sigma_rel)]).double()
        end = torch.tensor([float(STEPS)]).double()
        theirs = oracle.solve_weights(times, gammas, end, target).flatten().numpy()
        ours = np.array(solve_weights(found, sigma_rel).weights)
        # Nearly singular: other weights may make the same profile. Theirs need not sum to 1, so ours may fit a bit less.
        products = profile_products(times.numpy()[:, None], gammas.numpy()[:, None], times.numpy(), gammas.numpy())
        apart = np.sqrt((ours - theirs) @ products @ (ours - theirs))
        assert apart / np.sqrt(float(oracle.p_dot_p(end, target, end, target))) < 0.01
        assert ours.sum() == pytest.approx(1)


def test_tracking_agrees_with_ema_pytorch() -> None:
    oracle = pytest.importorskip("ema_pytorch.post_hoc_ema")
    model = Net()
    ema = PostHocEMA(model, sigma_rel=[0.1])
    theirs = oracle.KarrasEMA(model, sigma_rel=0.1, update_every=1)
    for step in range(1, 30):
        walk(model, step)
        ema.update()
        if step == 1:
            ema.update()  # theirs counts the weights that it starts from as a step of their own
        theirs.update()
    for name, value in ema.state_dict()["shadow"]["0.1"].items():
        torch.testing.assert_close(value, theirs.ema_model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_snapshots_of_seldom_moved_averages_count_what_is_in_them(tmp_path: Path) -> None:
    model = Net()
    ema = PostHocEMA(model, every=4)
    with manager(tmp_path, model, stateful={"ema": ema}, save_total_limit=None) as m:
        for step in range(1, 12):
            walk(model, step)
            ema.update()
            if step in (2, 7, 11):
                m.save(step=step)
    assert [(s.step, s.count, s.sigma_rel) for s in snapshots(tmp_path)] == [
        (7, 4, 0.05), (7, 4, 0.1), (11, 8, 0.05), (11, 8, 0.1)]  # fmt: skip


def test_what_has_no_snapshots_says_so(tmp_path: Path) -> None:
    model = Net()
    ema = EMAModel(model)
    with manager(tmp_path, model, stateful={"ema": ema}) as m:
        ema.update()
        m.save(step=1)
    with pytest.raises(CheckpointNotFound, match="PostHocEMA"):
        snapshots(tmp_path)
    with pytest.raises(ConfigError, match="sigma_rel"):
        PostHocEMA(model, sigma_rel=[0.5])
    with pytest.raises(ConfigError):
        solve_weights([Snapshot("", 1, "ema.0.05.", 0.05, 1)], 0.4)


def test_snapshots_of_different_models_are_refused(tmp_path: Path) -> None:
    found = []
    for step, width in ((1, 3), (2, 4)):
        root = tmp_path / str(width)
        model = torch.nn.Linear(width, 2)
        ema = PostHocEMA(model)
        with manager(root, model, stateful={"ema": ema}) as m:
            for _ in range(step):
                ema.update()
            m.save(step=step)
        found += snapshots(root)
    with pytest.raises(IncompatibleState, match=r"weight has shape \[2, 3\]"):
        list(combined(solve_weights(found, 0.07)))


class Buffered(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(3, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.register_buffer("expert_bias", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))


def test_buffers_that_averages_follow_are_the_newest_snapshots(tmp_path: Path) -> None:
    model = Buffered()
    ema = PostHocEMA(model)
    with manager(tmp_path / "run", model, stateful={"ema": ema}, save_total_limit=None) as m:
        for step in range(1, 7):
            with torch.no_grad():
                model.up.weight.add_(0.1)
                model.expert_bias.copy_(torch.tensor([0.1, -0.3, 7.0, 1 / 3]) * step)
                model.norm.running_mean.add_(1.0)
                model.calls.add_(1)
            ema.update()
            m.save(step=step)
    with pytest.raises(IncompatibleState, match=r"BatchNorm.*norm\.running_mean"):  # still a choice to be made
        average_posthoc(tmp_path / "run", tmp_path / "refused", 0.07)
    rules = Rules(batchnorm="copy_newest")
    for at in (None, 4):
        out = tmp_path / f"out {at}"
        average_posthoc(tmp_path / "run", out, 0.07, at=at, options=Options(rules=rules))
        found = open_checkpoint(out).state_dict("model.")
        wanted, how = synthesise(tmp_path / "run", 0.07, step=at)
        assert min(how.weights) < 0
        newest = open_checkpoint(how.snapshots[-1].path).state_dict("model.")
        for name in ("expert_bias", "calls", "norm.running_mean"):
            assert torch.equal(found[name], newest[name])
            assert torch.equal(wanted[name], newest[name])
        torch.testing.assert_close(found["up.weight"], wanted["up.weight"], rtol=1e-6, atol=1e-6)
        assert not torch.equal(found["up.weight"], newest["up.weight"])
    with pytest.raises(IncompatibleState, match="calls"):  # what Rules say about integers holds
        average_posthoc(
            tmp_path / "run", tmp_path / "equal", 0.07, options=Options(rules=Rules("equal", batchnorm="copy_newest"))
        )


def test_snapshots_from_before_a_new_beginning_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(3, 2)
    ema = PostHocEMA(model)
    with manager(tmp_path / "run", model, stateful={"ema": ema}, save_total_limit=None) as m:
        for step in range(1, 10):
            with torch.no_grad():
                model.weight.fill_(1000.0 + step if step <= 5 else float(step))
            if step == 6:
                ema.reset()
            ema.update()
            m.save(step=step)
    assert [s.count for s in snapshots(tmp_path / "run")][::2] == [1, 2, 3, 4, 5, 1, 2, 3, 4]
    with caplog.at_level("WARNING", logger="distckpt"):
        found, how = synthesise(tmp_path / "run", 0.07)
    assert {s.step for s in how.snapshots} == {6, 7, 8, 9}
    assert (how.count, how.left_out) == (4, (1, 2, 3, 4, 5))
    assert "began again between steps 5 and 6" in caplog.text
    assert float(found["weight"].max()) <= 9.5  # nothing of the weights before
    report = average_posthoc(tmp_path / "run", tmp_path / "out", 0.07)
    assert report.fit is not None
    assert report.fit["left_out"] == [1, 2, 3, 4, 5]
    caplog.clear()
    _, early = synthesise(tmp_path / "run", 0.07, step=5)  # an average that ended before it
    assert ({s.step for s in early.snapshots}, early.count, early.left_out) == ({1, 2, 3, 4, 5}, 5, ())
    assert not caplog.text


def test_a_larger_every_after_a_resume_is_no_new_beginning() -> None:
    found = [Snapshot("", step, "ema.0.05.", 0.05, count, step) for step, count in ((50, 50), (101, 101), (105, 100), (120, 120))]
    how = solve_weights(found, 0.07)
    assert (len(how.snapshots), how.left_out) == (4, ())
