"""EMAs beside other libraries: one update against what memory allows, and what saving one with the model costs.

    python -m benchmarks --only ema [--only ema-save]

The bound of an update is a triad (one flat ``a += x * b``, as many fp32 elements as the model has) before and after each turn:
an update cannot do without reading a weight and reading and writing its shadow. With bf16 weights it is scaled by the bytes
that must move. What keeps no fp32 shadow of bf16 weights does other work, and takes no part there. Weights are the
user's, in pages of 4 KiB; how much of an update's time that is, a row with weights in huge pages shows.

Other libraries are imported where they are installed; timm's one file is loaded by path, as timm itself wants torchvision.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from benchmarks.jobs import Job
from benchmarks.measures import Measure, Test
from benchmarks.peers import OURS
from benchmarks.report import Results
from benchmarks.run import Bench, Row, folder_for, palindrome
from distckpt import CheckpointConfig, CheckpointManager, EMAModel
from distckpt.storage.direct import anonymous

DECAY = 0.999
THREE, SEED = "distckpt, 3 decays", "per-tensor formula"
HUGE = "distckpt, weights in huge pages"
SWA, SWA_FOREACH = "AveragedModel avg_fn", "AveragedModel multi_avg_fn"
EMA_PYTORCH, TIMM = "ema-pytorch foreach", "timm V3, fp32 shadow"
PEERS = (SEED, TIMM, SWA, SWA_FOREACH, EMA_PYTORCH)
"""Whom ``--peers`` may name besides ours."""
PACKAGES = {EMA_PYTORCH: "ema-pytorch", TIMM: "timm", SWA: "torch", SWA_FOREACH: "torch"}
UPDATE, STALL = "ema update", "ema stall"
BESIDE = "distckpt, as many bytes without an EMA"
LEAST_S = 0.1
"""Seconds that a turn takes: updates are repeated for so long."""


def llama(ranks: int) -> Iterator[tuple[int, ...]]:
    """Yield the shapes that one of ``ranks`` holds of an 8-billion-parameter Llama: 291 tensors cut along their rows."""
    hidden, inner, key = 4096, 14336, 1024
    layer = [(hidden, hidden), (key, hidden), (key, hidden), (hidden, hidden), (inner, hidden), (inner, hidden),
             (hidden, inner), (hidden,), (hidden,)]  # fmt: skip
    for shape in [(128256, hidden), *layer * 32, (hidden,), (128256, hidden)]:
        yield (shape[0] // ranks, *shape[1:])


def shapes_of(name: str, nbytes: int) -> list[tuple[int, ...]]:
    """Return the shapes of a model of about so many bytes of fp32."""
    if name == "llama8b":
        return list(llama(max(1, round(8.03e9 * 4 / nbytes))))
    if name == "small":
        few: list[tuple[int, ...]] = [(n,) for n in (1000, 4000, 16000, 30000)]
        return few * max(1, round(nbytes / 4 / 51000))
    one: list[tuple[int, ...]] = [(nbytes // 4,)]
    return one


def model_of(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> nn.Module:
    """Return a module with these parameters in submodules of nine, as layers have them."""
    model = nn.ModuleList()
    for start in range(0, len(shapes), 9):
        layer = nn.Module()
        for number, shape in enumerate(shapes[start : start + 9]):
            layer.register_parameter(f"p{number}", nn.Parameter(torch.randn(shape).to(dtype)))
        model.append(layer)
    return model


def seed_formula(model: nn.Module) -> Callable[[], Any]:
    """Return an update that walks the parameters and makes each shadow anew (fp32 shadows)."""
    shadow = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}

    def update() -> None:
        for name, parameter in model.named_parameters():
            shadow[name] = DECAY * shadow[name] + (1 - DECAY) * parameter.detach()

    return update


def in_huge_pages(model: nn.Module) -> Callable[[], Any]:
    """Return our update of weights like these, one after another in huge pages."""
    layers = [tuple(p.shape) for p in model.parameters()]
    other = model_of(layers, next(model.parameters()).dtype)
    memory = anonymous(sum(p.nbytes for p in other.parameters()))
    for parameter in other.parameters():
        mine, memory = memory[: parameter.nbytes], memory[parameter.nbytes :]
        moved = torch.frombuffer(mine, dtype=parameter.dtype).view(parameter.shape)
        parameter.data = moved.copy_(parameter.detach())
    return EMAModel(other, decay=DECAY).update


def averaged_model(model: nn.Module, **options: Any) -> Callable[[], Any]:
    averaged = AveragedModel(model, **options)
    averaged.update_parameters(model)  # the first one copies
    return lambda: averaged.update_parameters(model)


def ema_pytorch(model: nn.Module) -> Callable[[], Any]:
    from ema_pytorch import EMA  # type: ignore[import-untyped]

    ema = EMA(model, beta=DECAY, update_every=1, update_after_step=0, include_online_model=False, use_foreach=True)
    ema.update()
    update: Callable[[], Any] = ema.update
    return update


def timm(model: nn.Module) -> Callable[[], Any]:
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("timm is not installed")
    path = Path(spec.submodule_search_locations[0]) / "utils" / "model_ema.py"
    found: Any = importlib.util.spec_from_file_location("timm_model_ema", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    ema = module.ModelEmaV3(model, decay=DECAY, dtype=torch.float32)
    return lambda: ema.update(model)


def contestants(dtype: torch.dtype) -> dict[str, Callable[[nn.Module], Callable[[], Any]]]:
    """Return what to compare, by name; with low-precision weights only what keeps fp32 shadows does the same work."""
    same_work: dict[str, Callable[[nn.Module], Callable[[], Any]]] = {
        OURS: lambda m: EMAModel(m, decay=DECAY).update,
        HUGE: in_huge_pages,
        THREE: lambda m: EMAModel(m, decay=[0.99, 0.999, 0.9999]).update,
        SEED: seed_formula,
        TIMM: timm,
    }
    if dtype != torch.float32:
        return same_work
    return {
        **same_work,
        SWA: lambda m: averaged_model(m, avg_fn=get_ema_avg_fn(DECAY)),  # type: ignore[no-untyped-call]
        SWA_FOREACH: lambda m: averaged_model(m, multi_avg_fn=get_ema_multi_avg_fn(DECAY)),  # type: ignore[no-untyped-call]
        EMA_PYTORCH: ema_pytorch,
    }


# ---------------------------------------------------------------------- one update


def triad(numel: int) -> Callable[[], dict[str, float]]:
    """Return a probe: bytes a second of ``a += x * b`` over so many elements."""
    one, other = torch.randn(numel), torch.randn(numel)

    def probe() -> dict[str, float]:
        return {"triad": 12 * numel / repeated(lambda: one.add_(other, alpha=1 - DECAY))}

    return probe


def repeated(work: Callable[[], Any]) -> float:
    """Return seconds of one of several calls, which take ``LEAST_S`` together; after one that does not count."""
    work()
    count, started = 0, time.perf_counter()
    while (took := time.perf_counter() - started) < LEAST_S:
        work()
        count += 1
    return took / count


def updates(bench: Bench) -> None:
    """Update every contestant's average in turn, on one live model."""
    for name in ("llama8b", "small", "one-big"):
        for dtype in (torch.float32, torch.bfloat16):
            if name == "llama8b" or dtype == torch.float32:
                _updates(bench, name, dtype)
                gc.collect()


def _updates(bench: Bench, name: str, dtype: torch.dtype) -> None:
    model = model_of(shapes_of(name, bench.settings.nbytes // 4), dtype)
    numel = sum(p.numel() for p in model.parameters())
    works: dict[str, Callable[[], Any]] = {}
    for peer, make in contestants(dtype).items():
        if bench.settings.peers and peer not in bench.settings.peers:
            continue
        try:
            works[peer] = make(model)
        except (ImportError, OSError) as error:
            bench.absent[peer] = f"{type(error).__name__}: {error}"
            bench.add({"kind": "absent", "peer": peer, "error": bench.absent[peer]})
            continue
        if peer not in bench.versions and peer in PACKAGES:
            bench.add({"kind": "peer", "peer": peer, "version": version_of(PACKAGES[peer])})
    probe = triad(numel)
    for number in range(1, 1 + bench.settings.rounds):
        for peer in palindrome(list(works)):
            shadows = 3 if peer == THREE else 1
            nbytes = numel * (dtype.itemsize + 8 * shadows)
            text = str(dtype).removeprefix("torch.")
            about = {"workload": f"{name} {text}", "world": 1, "part": UPDATE, "peer": peer, "round": number}
            bench.measure(about, partial(_row, works[peer], nbytes), probe, shared=True)


def _row(work: Callable[[], Any], nbytes: int) -> Row:
    cpu = time.process_time()
    started = time.perf_counter()
    seconds = repeated(work)
    used = (time.process_time() - cpu) * seconds / (time.perf_counter() - started)
    return {"seconds": seconds, "nbytes": nbytes, "min_rank_bytes_s": nbytes / seconds, "cpu_seconds": used}


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


# ---------------------------------------------------------------------- saved with the model


def saving(bench: Bench) -> None:
    """Stall of a background save of a model with its EMA, beside a model of as many bytes that has none."""
    each = bench.settings.nbytes // 8
    with folder_for(bench, "ema-save") as root:
        with_ema, without = model_of(shapes_of("llama8b", each), torch.float32), nn.ModuleList()
        without.extend(model_of(shapes_of("llama8b", each), torch.float32) for _ in range(2))
        models, ema = {OURS: with_ema, BESIDE: without}, EMAModel(with_ema, decay=DECAY)
        managers = {
            OURS: _manager(root / "ema", with_ema, {"ema": ema}),
            BESIDE: _manager(root / "plain", without, {}),
        }
        nbytes = 2 * sum(p.numel() * 4 for p in with_ema.parameters())
        one, other = torch.randn(nbytes // 4), torch.randn(nbytes // 4)

        def probe() -> dict[str, float]:
            return {"copy": nbytes / repeated(lambda: one.copy_(other))}

        def save(peer: str) -> Row:
            manager = managers[peer]
            with torch.no_grad():
                torch._foreach_mul_(list(models[peer].parameters()), 0.999)
            if peer == OURS:
                ema.update()
            started = time.perf_counter()
            manager.save(step=bench.step())
            stall = time.perf_counter() - started
            manager.wait()
            whole = time.perf_counter() - started
            return {"seconds": whole, "stall_seconds": stall, "nbytes": nbytes, "min_rank_bytes_s": nbytes / whole}

        for peer in managers:
            save(peer)  # plans, buffers
        for number in range(1, 1 + 2 * bench.settings.rounds):
            for peer in palindrome(list(managers)):
                about = {"workload": "ema-save", "world": 1, "part": STALL, "peer": peer, "round": number}
                bench.measure(about, partial(save, peer), probe)
        for manager in managers.values():
            manager.close()


def _manager(root: Path, model: nn.Module, stateful: dict[str, Any]) -> CheckpointManager:
    config = CheckpointConfig(root, async_save=True, save_total_limit=2, preemption_signals=(), control_file=None,
                              verbose=False)  # fmt: skip
    return CheckpointManager(config, model=model, stateful=stateful)


# ---------------------------------------------------------------------- what the suite asks for


def jobs() -> list[Job]:
    return [
        Job("ema", "one EMA update, in place", updates),
        Job("ema-save", "stall of saving an EMA with its model", saving),
    ]


def measures() -> list[Measure]:
    return [
        Measure("EMA update ÷ three streams of memory", "≤ 1.10 ×, ≥ 4× AveragedModel", "≤ 1.02 ×", judge_update),
        Measure("stall of model and EMA ÷ of as many bytes without one", "≤ 1.10", "≤ 1.02", judge_stall),
    ]


def judge_update(results: Results) -> list[Test]:
    out = []
    for workload in ("llama8b float32", "llama8b bfloat16", "small float32", "one-big float32"):
        ours = results.one(workload, UPDATE, OURS)
        share = ours.fraction()
        out.append(Test(f"{workload} ÷ bound", 1 / share if share else None, 1.10, 1.02, at_least=False, unit="×",
                        why=ours.error or "not measured in this run", void=ours.only_void))  # fmt: skip
    ours, theirs = (results.one("llama8b float32", UPDATE, peer) for peer in (OURS, SWA))
    ratio = theirs.seconds / ours.seconds if ours.seconds and theirs.seconds else None
    void, share = ours.only_void or theirs.only_void, theirs.fraction()
    return [
        *out,
        Test("AveragedModel ÷ ours", ratio, 4.0, None, unit="×", void=void),
        Test("AveragedModel ÷ bound", 1 / share if share else None, None, None, unit="×", void=theirs.only_void),
    ]


def judge_stall(results: Results) -> list[Test]:
    ours, beside = (results.one("ema-save", STALL, peer) for peer in (OURS, BESIDE))
    mine, other = ours.median("stall_seconds"), beside.median("stall_seconds")
    ratio = mine / other if mine and other else None
    why = ours.error or beside.error or "not measured in this run"
    return [
        Test("stalls", ratio, 1.10, 1.02, at_least=False, unit="×", why=why, void=ours.only_void or beside.only_void)
    ]
