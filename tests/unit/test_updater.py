"""The one pass that moves shadows: every way through it gives the same numbers, in bounded memory."""

from __future__ import annotations

import threading

import pytest
import torch

from distckpt.averaging import updater
from distckpt.averaging.updater import Pair, Updater

GRAIN = 32768
"""Elements from which torch divides a tensor among its threads."""
SIZES = [(0,), (), (1,), (17, 3), (GRAIN - 1,), (GRAIN,), (5, GRAIN // 2), (3 * GRAIN + 7,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pairs_of(dtypes: list[torch.dtype], averages: int, sizes: list[tuple[int, ...]] = SIZES) -> list[Pair]:
    generator = torch.Generator().manual_seed(1)
    out = []
    for number, size in enumerate(sizes):
        source = torch.randn(size, generator=generator).to(dtypes[number % len(dtypes)])
        shadows = tuple(torch.randn(size, generator=generator) for _ in range(averages))
        out.append(Pair(source, shadows))
    sliced = torch.randn(40, 60, generator=generator)[:, 7:33]  # not dense: it has to keep its own shape
    out.append(Pair(sliced, tuple(torch.randn(40, 26, generator=generator) for _ in range(averages))))
    return out


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("averages", [1, 3])
@pytest.mark.parametrize("dtypes", [[torch.float32], DTYPES], ids=["fp32", "mixed"])
def test_every_way_gives_the_formula(
    dtypes: list[torch.dtype], averages: int, threads: int, staged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SPREAD", 1000), ("STAGED", GRAIN)):
        monkeypatch.setattr(updater, name, value)
    monkeypatch.setattr(updater, "CHUNK", {"cpu": GRAIN, "cuda": GRAIN})
    pairs = pairs_of(dtypes, averages)
    plan = Updater(pairs, threads=threads, staged=staged)
    weights = [0.1, 0.01, 0.5][:averages]
    wanted = [[s.double() for s in pair.shadows] for pair in pairs]
    for _ in range(3):
        plan.run(weights)
        wanted = [
            [s + w * (pair.source.double() - s) for s, w in zip(shadows, weights, strict=True)]
            for pair, shadows in zip(pairs, wanted, strict=True)
        ]
    for pair, shadows in zip(pairs, wanted, strict=True):
        for found, want in zip(pair.shadows, shadows, strict=True):
            torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
    plan.run([1.0] * averages)
    for pair in pairs:
        for found in pair.shadows:
            assert torch.equal(found, pair.source.float())


@pytest.mark.parametrize("size", [(3, 40, 50), (2, 1, 3, 700), (1, 5000), (5000,), (7, 11), (), (0, 9), (4, 0), (2, 100, 1, 1)])
@pytest.mark.parametrize("limit", [1, 64, 100, 1000])
def test_pieces_are_small_whichever_dimension_is_large(size: tuple[int, ...], limit: int) -> None:
    whole = torch.zeros(size)
    shadow = torch.zeros((*size, 2))[..., 0]  # other strides
    pieces = list(Pair(whole, (shadow,)).cut(limit))
    for number, piece in enumerate(pieces):
        assert piece.source.numel() <= limit
        assert piece.source.shape == piece.shadows[0].shape
        for tensor in (piece.source, *piece.shadows):
            tensor += number + 1
    assert torch.equal(whole, shadow)  # the same places of both
    assert sum(piece.source.numel() for piece in pieces) == whole.numel()
    assert (whole > 0).all()


def test_threads_take_chunks_in_turn_and_start_none_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    whole = updater._Batch.run

    def run(batch: updater._Batch, weights: list[float], lanes: updater._Lanes, lane: int) -> None:
        seen.append((threading.get_ident(), torch.get_num_threads()))
        whole(batch, weights, lanes, lane)

    monkeypatch.setattr(updater._Batch, "run", run)
    chunk, before = updater.CHUNK["cpu"], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        plan = Updater(pairs_of([torch.float32], 1, [(8 * chunk,), (100,)]), threads=3)
        plan.run([0.5])
        plan.run([0.5])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 2 * 9
    assert {threads for _, threads in seen} == {1}
    assert threading.get_ident() not in {thread for thread, _ in seen}


def test_an_error_is_told_when_no_thread_works_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    working: list[int] = []
    whole = updater._Batch.run

    def run(batch: updater._Batch, weights: list[float], lanes: updater._Lanes, lane: int) -> None:
        if batch is plan._batches[0]:
            raise RuntimeError("no memory")
        working.append(lane)
        whole(batch, weights, lanes, lane)
        working.pop()

    plan = Updater(pairs_of([torch.float32], 1, [(8 * updater.CHUNK["cpu"],)]), threads=2)
    monkeypatch.setattr(updater._Batch, "run", run)
    with pytest.raises(RuntimeError, match="no memory"):
        plan.run([0.5])
    assert not working


def test_scratch_is_one_buffer_however_large_the_model() -> None:
    chunk = updater.CHUNK["cpu"]
    sizes = [(4 * chunk + 5,), (3, chunk), (100,), (2 * chunk,)]
    plan = Updater(pairs_of([torch.bfloat16], 1, sizes), threads=1)
    plan.run([0.5])
    held = list(plan._lanes._scratch.values())
    assert len(held) == 1
    assert held[0].numel() <= chunk


def test_weights_on_another_device_come_through_two_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updater, "STAGED", 1 << 16)
    plan = Updater(pairs_of([torch.float32], 1, [(1 << 19,), (77,)]), threads=1, staged=True)
    storages = [h.untyped_storage() for stage in plan._stages for hosts, _, _ in stage._steps for h in hosts]
    assert len(storages) > 8
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert len(held) == 2
    assert sum(held.values()) <= 2 * 4 * (1 << 16)


def test_fp32_weights_are_used_where_they_lie() -> None:
    plan = Updater(pairs_of([torch.float32], 1), threads=1)
    plan.run([0.5])
    assert plan._lanes._scratch == {}


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["beside", "offloaded"])
def test_on_an_accelerator(where: str) -> None:
    for averages in (1, 2):
        pairs = pairs_of(DTYPES, averages)
        wanted = [[s.clone() for s in pair.shadows] for pair in pairs]
        moved = [
            Pair(p.source.cuda(), p.shadows if where == "offloaded" else tuple(s.cuda() for s in p.shadows)) for p in pairs
        ]
        plan = Updater(moved)
        for _ in range(3):
            plan.run([0.25] * averages)
            for pair, shadows in zip(pairs, wanted, strict=True):
                for s in shadows:
                    s.lerp_(pair.source.float(), 0.25)
        for pair, shadows in zip(moved, wanted, strict=True):
            for found, want in zip(pair.shadows, shadows, strict=True):
                torch.testing.assert_close(found.cpu(), want, rtol=1e-5, atol=1e-6)
