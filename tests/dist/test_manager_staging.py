"""The staging buffer: one image of a shard's data region, filled anew by each save, complete when ``stage`` returns."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch
from manager_support import Net, assert_same, manager, snapshot, train

from distckpt import failpoints, open_checkpoint
from distckpt.boxes import Box
from distckpt.dcp.leaves import dtype_name
from distckpt.dcp.writer import Staged
from distckpt.errors import SnapshotFailed
from distckpt.format.placing import Piece
from distckpt.manager import staging, state_copy
from distckpt.manager.staging import StagingArena
from distckpt.storage.direct import HUGE_PAGE, address

DTYPES = (torch.float32, torch.bfloat16, torch.bool, torch.complex128, torch.int64, torch.float8_e4m3fn, torch.uint16)


def tensors(device: str, seed: int = 0) -> list[torch.Tensor]:
    """Return tensors of many dtypes: 0-d, empty, odd sizes, and views that are not contiguous."""
    torch.manual_seed(seed)
    out = [(torch.randn(17, 5) * 3).to(dtype) for dtype in DTYPES]
    wide = torch.randn(8, 6)
    out += [wide.t(), wide[:, ::2], wide[1:1], torch.tensor(2.5, dtype=torch.float64), torch.randn(3, 1).expand(3, 4)]
    if device == "cpu":
        return out
    moved = [t.contiguous().to(device) for t in out[: len(DTYPES)]]
    on_device = wide.to(device)
    return [
        *moved,
        on_device.t(),
        on_device[:, ::2],
        on_device[1:1],
        out[-2].to(device),
        out[-1][:, :1].to(device).expand(3, 4),
    ]


def pieces_of(views: list[torch.Tensor]) -> list[Piece]:
    return [Piece(f"t{i}", dtype_name(v.dtype), tuple(v.shape), Box.whole(tuple(v.shape))) for i, v in enumerate(views)]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def overwrite(views: list[torch.Tensor]) -> None:
    for view in views:
        base = view._base if view._base is not None else view
        base.zero_()


def check_three_times(device: str) -> StagingArena:
    arena = StagingArena()
    for seed in (1, 2, 3):
        views = tensors(device, seed)
        wanted = [raw(v) for v in views]
        staged = arena.stage(pieces_of(views), views)
        overwrite(views)
        assert isinstance(staged, Staged)
        assert [bytes(staged(i)) for i in range(len(views))] == wanted
        assert sorted(staged.image) == sorted(b"".join(wanted))
    assert arena.allocations == 1
    return arena


def test_staged_bytes_are_those_of_the_call() -> None:
    arena = check_three_times("cpu")
    larger = [torch.ones(10_000)]
    assert bytes(arena.stage(pieces_of(larger), larger)(0)) == raw(larger[0])
    assert arena.allocations == 2
    arena.release()
    assert arena.nbytes == 0
    assert bytes(arena.stage([], []).image) == b""


def test_several_threads_copy_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "copy_threads", lambda: 3)
    monkeypatch.setattr(staging, "CHUNK", 1)
    monkeypatch.setattr(state_copy, "CHUNK", 64)
    check_three_times("cpu")


def test_the_thread_that_waits_makes_its_share_of_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_copy, "CHUNK", 4096)
    monkeypatch.setattr(staging, "CHUNK", 4096)
    monkeypatch.setattr(staging, "copy_threads", lambda: 2)
    seen: list[str] = []
    both, move = threading.Barrier(2), state_copy.move

    def watched(target: int, source: int, nbytes: int) -> None:
        seen.append(threading.current_thread().name)
        if len(seen) <= 2:
            both.wait(30)  # neither goes on alone
        move(target, source, nbytes)

    monkeypatch.setattr(state_copy, "move", watched)
    views = [torch.randn(1024) for _ in range(8)]
    StagingArena().stage(pieces_of(views), views)
    assert set(seen) == {threading.current_thread().name, "distckpt-stage"}
    assert len(seen) == len(views)


def test_an_interrupted_copy_is_an_interruption_and_no_failed_save(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: int) -> None:
        raise KeyboardInterrupt

    views = [torch.randn(1024)]
    arena = StagingArena()
    with monkeypatch.context() as patch:
        patch.setattr(state_copy, "move", interrupted)
        with pytest.raises(KeyboardInterrupt):
            arena.stage(pieces_of(views), views)
    assert raw(views[0]) in bytes(arena.stage(pieces_of(views), views).image)


def test_of_an_interrupted_settle_the_writing_thread_hears_that_the_copy_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(state_copy, "move", interrupted)
    views = [torch.randn(1024)]
    copy = StagingArena().begin(pieces_of(views), views, ("t0",))
    with pytest.raises(KeyboardInterrupt):
        copy.settle(30)
    for call in (copy.check, lambda: copy.settle(30)):  # a KeyboardInterrupt there would end the thread, and no rank be told
        with pytest.raises(SnapshotFailed, match="KeyboardInterrupt"):
            call()


def test_a_stopped_copy_leaves_its_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_copy, "CHUNK", 4096)
    monkeypatch.setattr(staging, "copy_threads", lambda: 1)
    begun, go_on, move = threading.Event(), threading.Event(), state_copy.move
    seen: list[int] = []

    def held_up(target: int, source: int, nbytes: int) -> None:
        begun.set()
        assert go_on.wait(30)
        move(target, source, nbytes)
        seen.append(nbytes)

    views = [torch.randn(1024) for _ in range(8)]
    arena = StagingArena()
    with monkeypatch.context() as patch:
        patch.setattr(state_copy, "move", held_up)
        copy = arena.start(pieces_of(views), views)  # copies although this thread does not
        assert begun.wait(30)
        threading.Timer(0.1, go_on.set).start()
        copy.stop()
        assert seen == [4096]  # what was in hand is waited for, the rest left
    with pytest.raises(SnapshotFailed, match="stopped"):
        arena.complete(copy)
    staged = arena.stage(pieces_of(views), views)
    assert [bytes(staged(i)) for i in range(8)] == [raw(v) for v in views]


def test_a_large_arena_asks_for_huge_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without transparent huge pages")
    arena = StagingArena()
    large = [torch.ones(3 << 20)]
    image = arena.stage(pieces_of(large), large).image
    at = address(image)
    assert at % HUGE_PAGE == 0
    inside, flags = False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= at < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert "hg" in flags.split()


@pytest.mark.gpu
def test_device_tensors_are_copied_before_stage_returns() -> None:
    arena = check_three_times("cuda")
    assert arena._image.is_pinned()


@pytest.mark.gpu
def test_work_queued_on_the_current_stream_is_part_of_the_snapshot() -> None:
    arena = StagingArena()
    value = torch.zeros(1 << 24, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for step in range(1, 4):
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # the fill below has not run when stage is called
            value.fill_(step)
            staged = arena.stage(pieces_of([value]), [value])
            value.fill_(-1)  # the next optimizer step, on the stream that training uses
        assert (torch.frombuffer(staged(0), dtype=torch.float32) == step).all()


@pytest.mark.gpu
def test_host_and_device_tensors_mix_and_a_host_buffer_becomes_pinned() -> None:
    arena = StagingArena()
    host = [torch.arange(100)]
    arena.stage(pieces_of(host), host)
    mixed = [torch.arange(100), torch.arange(50.0, device="cuda"), torch.tensor(7, device="cuda")]
    wanted = [raw(t) for t in mixed]
    staged = arena.stage(pieces_of(mixed), mixed)
    overwrite(mixed)
    assert [bytes(staged(i)) for i in range(3)] == wanted
    assert arena._image.is_pinned()
    assert arena.allocations == 2


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["lazy", "background", "synchronous"])
def test_three_saves_of_a_model_on_the_device(tmp_path: Path, mode: str) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    model.cuda()
    for state in optimizer.state.values():
        state.update({k: v.cuda() for k, v in state.items() if k != "step"})
    wanted = {}
    with manager(tmp_path, model, optimizer, async_save=mode != "synchronous", lazy_staging=mode == "lazy") as m:
        for step in (1, 2, 3):
            wanted[step] = {n: t.cpu() for n, t in snapshot(model, optimizer).items()}
            failpoints.arm("writer.chunk:0:sleep=0.1;staging.copy:0:sleep=0.1")
            try:
                assert m.save(step=step) is not None
                with torch.no_grad():
                    for buffer in model.buffers():
                        buffer.add_(1)
                    m.fence()
                    for tensor in (*model.parameters(), *(s["exp_avg"] for s in optimizer.state.values())):
                        tensor.add_(1)
                m.wait()
            finally:
                failpoints.arm("")
        report = m.load(1, prove=True)
        assert report.proved == len(wanted[1])
    assert all(p.is_cuda for p in model.parameters())
    for step, values in wanted.items():
        checkpoint = open_checkpoint(tmp_path / f"step-{step:010d}")
        assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, values)
