"""What the suite saves, and its comparison: true tensor counts, the bytes asked for, and no byte that goes unseen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import limits, meters
from benchmarks.payload import POISON, Arena, Live, Noise
from benchmarks.shapes import CHANGING, COLUMNS, FLAT, REPLICATED, ROWS, TensorSpec, Workload, make_workload
from distckpt.storage import probes

MB = 1_000_000
COUNTS = {
    "llama8b": 4 * 291, "llama70b": 4 * 723, "llama405b": 4 * 1137, "llama1t": 4 * 1155, "small": 18_867, "one-big": 4,
    "replicated": 4 * 291, "zero-flat": 4 * 291,
}  # fmt: skip
TINY = Workload(
    "tiny",
    "",
    (TensorSpec("weights.a", (7, 6)), TensorSpec("weights.b", (5,)), TensorSpec("optim.a.master", (7, 6), "float32")),
)
NOISE = Noise()


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_tensor_counts_are_those_of_the_originals(name: str, count: int) -> None:
    workload = make_workload(name, 400 * MB)
    names = [spec.name for spec in workload.tensors]
    assert len(names) == len(set(names)) == count


@pytest.mark.parametrize("nbytes", [60 * MB, 400 * MB, 1760 * MB])
def test_bytes_come_close_to_what_was_asked_for(nbytes: int) -> None:
    for name in ("llama8b", "small", "one-big", "lora"):
        assert make_workload(name, nbytes).nbytes == pytest.approx(nbytes, rel=0.35 if nbytes < 100 * MB else 0.15), (
            name
        )


def test_the_known_sizes() -> None:
    weights = {spec.name: spec for spec in make_workload("llama8b", 1760 * MB).tensors}
    assert weights["weights.layers.0.self_attn.q_proj.weight"].shape == (512, 512)
    assert weights["weights.layers.0.mlp.down_proj.weight"].shape == (512, 1792)
    experts = [s.nbytes for s in make_workload("small", 1760 * MB).tensors if ".experts." in s.name]
    assert len(experts) == 18_432
    assert 80_000 < experts[0] < 120_000


def test_adapters_are_a_small_part_of_a_frozen_model() -> None:
    lora = make_workload("lora", 400 * MB)
    changing = sum(spec.nbytes for spec in lora.tensors if CHANGING in spec.name)
    assert 0 < changing < 0.01 * lora.nbytes


# ---------------------------------------------------------------- bytes


def live(placement: str, rank: int = 0, world: int = 1, workload: Workload = TINY) -> Live:
    """Return a rank's state without a process group: only DTensors would need one."""
    held = Live.__new__(Live)
    held.workload, held.rank, held.world, held.noise, held.mesh = workload.placed(placement), rank, world, NOISE, None
    held.locals, held.plain, held.tensors = [], {}, {}
    held._distributed = lambda spec, tensor: tensor  # type: ignore[method-assign]
    held._flat(Arena()) if placement == FLAT else held._cut(Arena())
    held.nbytes = sum(t.numel() * t.element_size() for t in held.plain.values())
    return held


def test_values_are_floats_of_a_trained_model_and_never_zero() -> None:
    state = live(
        ROWS, workload=Workload("w", "", (TensorSpec("w", (1000, 1000), "float32"), TensorSpec("v", (1000, 1000))))
    )
    state.fill()
    for tensor in state.plain.values():
        assert torch.isfinite(tensor).all()
        assert 0.018 < float(tensor.float().std()) < 0.022
        assert int((tensor == 0).sum()) < 10
    mantissa = state.plain["w"].view(torch.int32) & 0x7FFFFF
    assert len(torch.unique(mantissa[:100])) > 95_000


@pytest.mark.parametrize("placement", [ROWS, COLUMNS, REPLICATED, FLAT])
def test_ranks_of_any_layout_hold_parts_of_the_same_tensors(placement: str) -> None:
    whole = live(ROWS)
    whole.fill()
    parts = [live(placement, rank, 3) for rank in range(3)]
    for part in parts:
        part.fill()
        assert part.compare() == "equal"
    for spec in TINY.tensors:
        held = [local.tensor for part in parts for local in part.locals if local.spec.name == spec.name]
        wanted = whole.plain[spec.name]
        if placement == REPLICATED:
            assert all(torch.equal(one, wanted) for one in held)
        elif placement == FLAT:
            assert torch.equal(torch.cat([t.flatten() for t in held]), wanted.flatten())
        else:
            assert torch.equal(torch.cat(held, 1 if placement == COLUMNS and wanted.dim() > 1 else 0), wanted)


@pytest.mark.parametrize("placement", [ROWS, COLUMNS, FLAT])
def test_a_flipped_bit_is_found_wherever_it_is(placement: str) -> None:
    state = live(placement, 1, 2)
    state.fill()
    for local in state.locals:
        for at in range(local.octets.size):
            local.octets[at] ^= 1
            assert state.compare() == f"different: {local.spec.name}, byte {at} of rank 1's part"
            local.octets[at] ^= 1
    assert state.compare() == "equal"


def test_poison_leaves_nothing_of_the_values() -> None:
    state = live(ROWS)
    state.fill()
    state.poison()
    assert all((local.octets == POISON).all() for local in state.locals)
    assert state.compare().startswith("different")


def test_a_changed_tensor_has_other_values_until_both_sides_know() -> None:
    state = live(ROWS)
    state.fill()
    try:
        NOISE.versions["weights.b"] = 1
        assert state.compare() == "different: weights.b, byte 0 of rank 0's part"
        state.fill()
        assert state.compare() == "equal"
    finally:
        NOISE.versions.clear()
    assert state.compare().startswith("different: weights.b")


def test_every_tensor_has_a_storage_of_its_own_size() -> None:
    state = live(ROWS)
    for tensor in state.plain.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.data_ptr() % 4096 != 0 or tensor.data_ptr() % 64 == 0


def test_memory_is_taken_once() -> None:
    arena = Arena()
    first = arena.take(1 << 20)
    assert arena.take(1 << 10).ctypes.data == first.ctypes.data


# ---------------------------------------------------------------- limits and meters


def test_caches_are_dropped_and_warmed_and_mincore_says_so(tmp_path: Path) -> None:
    path = tmp_path / "file"
    limits.write_file(path, 8 << 20)
    assert path.stat().st_size == 8 << 20
    assert probes.warm_caches([path]) == 0
    assert probes.resident_pages(path.open("rb").fileno(), 8 << 20) == 2048
    if limits.drop_caches([path]):
        pytest.skip("this file system keeps its pages (tmpfs)")
    assert limits.disk_read([path], threads=2, request=1 << 20) > 0


def test_a_copy_larger_than_its_room_is_whole() -> None:
    source = np.arange(1000, dtype=np.uint8)
    for threads in (1, 3):
        assert limits.copy_rate(source, np.zeros(96, np.uint8), threads=threads) > 0


def test_what_a_child_costs_is_counted() -> None:
    code = """import sys, time
while time.process_time() < 0.2: pass
print(1, flush=True)
sys.stdin.read()"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        children = meters.descendants(os.getpid())
        assert child.pid in children
        with_child, without = meters.read(children), meters.read([])
        assert with_child.cpu_seconds - without.cpu_seconds > 0.05
        assert child.stdin is not None
        child.stdin.close()


def test_peak_memory_sees_what_was_given_back() -> None:
    peak = meters.PeakMemory()
    block = np.ones(64 << 20, np.uint8)
    del block
    assert peak.extra([]) > 48 << 20


def test_the_limits_with_checksums_hash_and_copy_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    monkeypatch.setattr(limits, "block_digests", lambda view: hashed.append(len(view)))
    wanted = np.arange(5 << 18, dtype=np.uint32).view(np.uint8)
    assert limits.verified_write(tmp_path, wanted, wanted.size, threads=3, request=1 << 20) > 0
    assert (sum(hashed), list(tmp_path.iterdir())) == (5 << 20, [])
    path = tmp_path / "file"
    path.write_bytes(wanted.tobytes()[:-4096])
    hashed.clear()
    found = np.zeros_like(wanted)
    assert limits.verified_read([path], found, threads=3, request=1 << 20) > 0
    assert sum(hashed) == wanted.size - 4096
    assert bytes(found[:-4096]) == path.read_bytes()
    assert not found[-4096:].any()
    assert limits.verified_read([path], np.empty(0, np.uint8), threads=2, request=1 << 20) > 0
    assert sum(hashed) == 2 * (wanted.size - 4096)
    found[:] = 0
    assert limits.verified_read([path], found, threads=2, request=1 << 20, hashed=False) > 0
    assert sum(hashed) == 2 * (wanted.size - 4096)
    assert bytes(found[:-4096]) == path.read_bytes()
