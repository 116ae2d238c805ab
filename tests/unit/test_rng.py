"""Random states: reading moves nothing, restoring is bit exact, new ranks get the documented stream."""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from distckpt.engines import accelerator, rng
from distckpt.engines.rng import canonical, capture_rng, derive_rng, fingerprint, restore_rng, rng_differences
from distckpt.errors import IncompatibleState
from distckpt.format import typed_json


@pytest.fixture(autouse=True)
def _no_accelerator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Keep the test's own machine out of it, and hand the process back as it was."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    monkeypatch.setattr(rng, "current_accelerator", lambda: None)
    yield
    if np.random.get_state(legacy=False)["bit_generator"] != "MT19937":
        np.random.set_bit_generator(np.random.MT19937())
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def draws() -> list[Any]:
    """Draw from every stream, an odd number of normals each so that cached second halves matter."""
    return [
        [random.random() for _ in range(3)] + [random.gauss(0, 1) for _ in range(3)] + [random.getrandbits(70)],
        [*np.random.rand(3), *np.random.randn(3), int(np.random.randint(0, 1 << 30))],
        [torch.rand(3).tolist(), [torch.randn(1, dtype=torch.float64).item() for _ in range(3)]],
        [torch.randn(1).item(), torch.randn(33).tolist(), torch.randperm(10).tolist()],
    ]


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_capture_advances_nothing() -> None:
    seed_all(1)
    expected = draws() + draws()
    seed_all(1)
    capture_rng()
    first = draws()
    capture_rng()
    fingerprint(capture_rng())
    derive_rng(capture_rng(), rank=5, step=9)
    assert first + draws() == expected


def test_restore_is_bit_exact_with_normals_half_used() -> None:
    seed_all(2)
    draws()  # odd numbers of normals: gauss_next and has_gauss are set now
    state = capture_rng()
    assert state["python"]["gauss_next"] is not None
    assert state["numpy"]["has_gauss"] == 1
    expected = draws()
    seed_all(99)
    assert draws() != expected
    assert restore_rng(state) == ["python", "numpy", "torch"]
    assert draws() == expected


def test_state_is_a_snapshot() -> None:
    seed_all(3)
    state = capture_rng()
    print_before = fingerprint(state)
    draws()
    restore_rng(state)
    draws()
    assert fingerprint(state) == print_before
    assert fingerprint(capture_rng()) != print_before


def test_survives_typed_json() -> None:
    seed_all(4)
    draws()
    state = capture_rng()
    back = typed_json.loads(typed_json.dumps(state))
    assert fingerprint(back) == fingerprint(state)
    expected = draws()
    restore_rng(back)
    assert draws() == expected


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "Philox", "SFC64"])
def test_other_numpy_bit_generators(kind: str) -> None:
    np.random.set_bit_generator(getattr(np.random, kind)(5))
    np.random.randn(3)
    state = capture_rng()
    expected = [*np.random.randn(3), *np.random.rand(5)]
    np.random.set_bit_generator(np.random.MT19937(0))
    restore_rng(state)
    assert [*np.random.randn(3), *np.random.rand(5)] == expected
    derived = derive_rng(state, rank=1, step=1)
    assert derived["numpy"]["bit_generator"] == kind
    restore_rng(derived)


def test_derived_streams_follow_the_documented_rule() -> None:
    seed_all(5)
    saved = capture_rng()

    def digest(data: bytes) -> str:
        return xxhash.xxh3_128_hexdigest(data)

    base = digest(canonical([saved, "distckpt-rng-1", 3, 120]))
    seeds = {name: int(digest(canonical(["distckpt-rng-1", base, name])), 16) for name in ("python", "numpy", "torch")}
    restore_rng(derive_rng(saved, rank=3, step=120))
    assert random.random() == random.Random(seeds["python"]).random()
    assert np.random.rand() == np.random.RandomState(np.random.MT19937(seeds["numpy"])).rand()
    generator = torch.Generator().manual_seed(seeds["torch"] % 2**64)
    assert torch.equal(torch.rand(4), torch.rand(4, generator=generator))


def test_canonical_bytes_are_pinned() -> None:
    def framed(data: bytes) -> bytes:
        return struct.pack("<Q", len(data)) + data

    assert canonical({"b": 1, "a": None}) == b"d" + b"".join(map(framed, [b"sa", b"n", b"sb", b"i1"]))
    assert canonical((True, -2, 1.5, "é", b"x")) == b"l" + b"".join(
        map(framed, [b"i1", b"i-2", b"f" + struct.pack(">d", 1.5), b"s\xc3\xa9", b"bx"])
    )
    assert canonical([1]) == canonical((1,))
    little, big = np.array([[1, 2]], "<u4"), np.array([[1, 2]], ">u4")
    assert canonical(little) == canonical(big)
    assert canonical(little) == canonical({"dtype": "<u4", "shape": [1, 2], "data": little.tobytes()})
    with pytest.raises(TypeError, match="object"):
        canonical(object())


def test_derived_streams_all_differ() -> None:
    seed_all(6)
    saved = [capture_rng(), (torch.rand(1), capture_rng())[1]]
    prints = set()
    for rank in range(2, 8):
        for step in (10, 11):
            derived = derive_rng(saved[rank % 2], rank=rank, step=step)
            prints |= {fingerprint(derived[name]) for name in ("python", "numpy", "torch")}
            assert fingerprint(derived) == fingerprint(derive_rng(saved[rank % 2], rank=rank, step=step))
    assert len(prints) == 6 * 2 * 3


def test_what_is_missing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    state = capture_rng()
    del state["numpy"]
    assert restore_rng(state) == ["python", "torch"]
    assert "numpy: no saved state" in caplog.text


@pytest.mark.parametrize("name", ["python", "numpy", "torch"])
def test_a_state_that_does_not_fit(name: str) -> None:
    state = capture_rng()
    state[name] = {
        "python": {"version": 3, "words": b"\0" * 8, "gauss_next": None},
        "numpy": {},
        "torch": b"\0" * 9,
    }[name]
    with pytest.raises(IncompatibleState, match=name):
        restore_rng(state)


def test_another_version() -> None:
    with pytest.raises(IncompatibleState, match="version 2"):
        restore_rng({**capture_rng(), "version": 2})


class FakeDevices:
    """Stands for torch.cuda: one CPU generator per device."""

    def __init__(self, count: int, initialised: bool = True) -> None:
        self.generators = [torch.Generator().manual_seed(100 + index) for index in range(count)]
        self.initialised = initialised

    def is_initialized(self) -> bool:
        return self.initialised

    def device_count(self) -> int:
        return len(self.generators)

    def get_rng_state(self, index: int) -> torch.Tensor:
        return self.generators[index].get_state()

    def set_rng_state(self, state: torch.Tensor, index: int) -> None:
        self.generators[index].set_state(state)

    def draw(self) -> list[float]:
        return [torch.rand(1, generator=generator).item() for generator in self.generators]


def use(monkeypatch: pytest.MonkeyPatch, devices: FakeDevices, *, current: int = 0, kind: str = "cuda") -> FakeDevices:
    here = accelerator.Accelerator(kind, devices)
    monkeypatch.setattr(rng, "current_accelerator", lambda: here)
    monkeypatch.setattr(accelerator.Accelerator, "current", property(lambda self: current))
    seeded = lambda self, index, seed: torch.Generator().manual_seed(seed).get_state().numpy().tobytes()  # noqa: E731
    monkeypatch.setattr(accelerator.Accelerator, "seeded_state", seeded)
    return devices


def test_devices_come_back_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = use(monkeypatch, FakeDevices(3), current=1)
    state = capture_rng()
    expected = devices.draw()
    assert restore_rng(state)[3:] == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices.draw() == expected
    assert rng_differences(state) == []


def test_the_used_device_keeps_its_stream_when_its_index_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    state_of = use(monkeypatch, FakeDevices(3), current=2)
    state = capture_rng()
    streams = state_of.draw()
    one = use(monkeypatch, FakeDevices(1))
    assert restore_rng(state)[3:] == ["cuda:0"]
    assert one.draw() == [streams[2]]
    assert [note.split(":")[1][0] for note in rng_differences(state)] == ["0", "1", "0"]
    three = use(monkeypatch, FakeDevices(3), current=0)
    restore_rng(state)
    assert three.draw() == [streams[2], streams[1], streams[0]]
    assert rng_differences(state) == ["cuda:0: got the state of cuda:2", "cuda:2: got the state of cuda:0"]


def test_devices_that_do_not_match_are_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    without = capture_rng()
    use(monkeypatch, FakeDevices(2))
    state = capture_rng()
    assert restore_rng(without) == ["python", "numpy", "torch"]
    assert "cuda:1: no saved state" in caplog.text
    use(monkeypatch, FakeDevices(1), kind="xpu")
    assert rng_differences(state) == [
        "cuda:0: state saved, but no such device here; not restored",
        "cuda:1: state saved, but no such device here; not restored",
        "xpu:0: no saved state, left as it is",
    ]
    monkeypatch.setattr(rng, "current_accelerator", lambda: None)
    assert restore_rng(state) == ["python", "numpy", "torch"]
    assert "cuda:0: state saved, but no such device here" in caplog.text


def test_an_unused_accelerator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeDevices(2, initialised=False))
    state = capture_rng()
    assert state["devices"] is None
    assert rng_differences(state) == []
    assert restore_rng(state) == ["python", "numpy", "torch"]


def test_derived_device_streams_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = use(monkeypatch, FakeDevices(2))
    saved = capture_rng()
    drawn = []
    for rank in (2, 3):
        assert restore_rng(derive_rng(saved, rank=rank, step=7))[3:] == ["cuda:0", "cuda:1"]
        drawn += devices.draw()
    assert len(set(drawn)) == 4
    monkeypatch.setattr(rng, "current_accelerator", lambda: None)
    assert "no such device here" in rng_differences(derive_rng(saved, rank=2, step=7))[0]


@pytest.mark.parametrize("devices", [{"type": "cuda"}, {"type": "cuda", "states": [b""], "current": 1}])
def test_a_malformed_device_record(monkeypatch: pytest.MonkeyPatch, devices: dict[str, Any]) -> None:
    use(monkeypatch, FakeDevices(2))
    with pytest.raises(IncompatibleState, match="malformed"):
        restore_rng({**capture_rng(), "devices": devices})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_stream_is_bit_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "current_accelerator", accelerator.current_accelerator)
    torch.rand(3, device="cuda")
    state = capture_rng()
    expected = torch.nn.functional.dropout(torch.ones(999, device="cuda")).cpu()
    assert "cuda:0" in restore_rng(state)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(999, device="cuda")).cpu(), expected)
    restore_rng(derive_rng(state, rank=1, step=1))
    derived = torch.rand(9, device="cuda").cpu()
    restore_rng(derive_rng(state, rank=1, step=1))
    assert torch.equal(torch.rand(9, device="cuda").cpu(), derived)
