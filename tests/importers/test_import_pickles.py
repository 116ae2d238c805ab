"""Hostile and damaged pickled files: refused by name, nothing runs, nothing is written."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distckpt.errors import CorruptCheckpoint, ForbiddenPickle
from distckpt.importers import restricted_unpickler
from distckpt.importers.convert import convert
from distckpt.importers.files import FileTensor
from distckpt.importers.pickled import Pickled, read_pickled


class Runs:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def command(tmp_path: Path) -> Runs:
    return Runs(os.system, f"touch {tmp_path / 'ran'}")


def zipped(path: Path, data: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in records.items():
            archive.writestr(f"archive/data/{name.removeprefix('_')}", content)
    return path


def refused(path: Path, tmp_path: Path, name: str, **more: Any) -> None:
    with pytest.raises(ForbiddenPickle, match=name) as caught:
        convert(path, tmp_path / "out", **more)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- refused by name


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_torch_file_that_runs_a_command(tmp_path: Path, zip_format: bool) -> None:
    content = {"w": torch.zeros(2), "x": command(tmp_path)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)
    refused(tmp_path / "a.pt", tmp_path, "posix.system")


def test_a_metadata_file_that_runs_a_command(tmp_path: Path) -> None:
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(command(tmp_path)))
    refused(tmp_path / "dcp", tmp_path, "posix.system")


def test_a_bin_file_that_runs_a_command(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    torch.save({"w": torch.zeros(2), "x": command(tmp_path)}, tmp_path / "hf" / "pytorch_model.bin")
    refused(tmp_path / "hf", tmp_path, "posix.system")


def test_a_deepspeed_file_that_runs_a_command(tmp_path: Path) -> None:
    (tmp_path / "ds").mkdir()
    torch.save({"module": command(tmp_path)}, tmp_path / "ds" / "mp_rank_00_model_states.pt")
    refused(tmp_path / "ds", tmp_path, "posix.system")


@pytest.mark.parametrize(
    "data",
    [
        b"cposix\nsystem\n(S'touch RAN'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n(ctorch._utils\n_rebuild_tensor_v2\nS'__globals__'\ntR.",
        b"(S'touch RAN'\niposix\nsystem\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x011\x85R.",
        b"cimportlib\nimport_module\n(S'os'\ntR.",
        b"ccollections\nOrderedDict.fromkeys\n.",
        b"\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.",
        b"cdistckpt.importers.restricted_unpickler\nmain\n.",
        b"ctorch\nload\n.",
    ],
    ids=range(10),
)
def test_globals_that_are_not_listed(tmp_path: Path, data: bytes) -> None:
    refused(zipped(tmp_path / "a.pt", data.replace(b"RAN", str(tmp_path / "ran").encode())), tmp_path, "names ")


def test_the_extension_registry_and_codecs_do_not_help(tmp_path: Path) -> None:
    with pytest.raises((ForbiddenPickle, CorruptCheckpoint)):
        read_pickled([Pickled(zipped(tmp_path / "a.pt", b"\x80\x02\x82\x01."))])
    data = b"c_codecs\nencode\n(Vabc\nVzip\ntR."
    refused(zipped(tmp_path / "b.pt", data), tmp_path, "_codecs.encode")


def test_a_class_can_be_allowed_and_is_only_data(tmp_path: Path) -> None:
    class Config:
        def __setstate__(self, state: Any) -> None:
            raise AssertionError("code of the class ran")

    Config.__qualname__, Config.__module__ = "Config", __name__
    globals()["Config"] = Config
    config = Config()
    config.layers = 3  # type: ignore[attr-defined]
    torch.save({"model": {"w": torch.ones(2)}, "config": config}, tmp_path / "a.pt")
    name = f"{__name__}.Config"
    refused(tmp_path / "a.pt", tmp_path, name)
    found = read_pickled([Pickled(tmp_path / "a.pt")], allow=[name])[0]
    assert found["config"] == {"class": name, "layers": 3}


def test_allowing_os_system_still_runs_nothing(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "x": command(tmp_path)}, tmp_path / "a.pt")
    found = read_pickled([Pickled(tmp_path / "a.pt")], allow=["posix.system"])[0]
    assert str(found["x"]).startswith("touch ")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- damaged, endless, lying


def laughs() -> bytes:
    node: list[Any] = [0] * 10
    for _ in range(30):
        node = [node] * 10
    return pickle.dumps(node)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x80\x02", b"\x80\x02K\x01", b"not a pickle", b"(" * 100000 + b".",
        b"(l" * 50000 + b"a" * 50000 + b".", b"\x80\x02]q\x00h\x00a.", b"\x80\x04\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02K\x01r\xff\xff\xff\xff.", b"cbuiltins\nlist\n(cbuiltins\nobject\ntR.",
    ],
    ids=range(10),
)  # fmt: skip
def test_pickles_that_make_no_sense(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"a\.pt"):
        read_pickled([Pickled(zipped(tmp_path / "a.pt", data))])


def test_a_small_pickle_of_endless_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restricted_unpickler, "MAX_NODES", 10**5)  # the child's own limit takes a quarter of a minute
    path = zipped(tmp_path / "a.pt", laughs())
    request = {"path": str(path), "start": 0, "size": None, "form": "torch", "profile": "torch", "allow": []}
    assert "values" in restricted_unpickler.answer(request)["unreadable"]


def rebuilt(shape: Any, stride: Any, offset: int = 0, numel: int = 4, key: str = "0") -> bytes:
    class Storage:
        pass

    class Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", numel) if isinstance(obj, Storage) else None

    out = io.BytesIO()
    call = Runs(torch._utils._rebuild_tensor_v2, Storage(), offset, shape, stride, False, {})
    Pickler(out, protocol=2).dump({"w": call})
    return out.getvalue()


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "numel"),
    [
        ((5,), (1,), 0, 4), ((4,), (1,), 1, 4), ((2, 2), (4, 1), 0, 4), ((4,), (1,), 0, 5), ((-1,), (1,), 0, 4),
        ((4,), (-1,), 3, 4), ((2**40,), (0,), 0, 4), ((2**61, 2**61), (0, 0), 0, 4), ((4,), (1, 1), 0, 4),
        ((1.0,), (1,), 0, 4), ((True,), (1,), 0, 4),
    ],
)  # fmt: skip
def test_tensors_that_lie_about_their_storage(tmp_path: Path, shape: Any, stride: Any, offset: int, numel: int) -> None:
    path = zipped(tmp_path / "a.pt", rebuilt(shape, stride, offset, numel), _0=bytes(16))
    with pytest.raises(CorruptCheckpoint, match=r"a\.pt"):
        read_pickled([Pickled(path)])


def test_a_missing_or_compressed_storage(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="missing, compressed or too short"):
        read_pickled([Pickled(zipped(tmp_path / "a.pt", rebuilt((4,), (1,))))])
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", rebuilt((4,), (1,)))
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(CorruptCheckpoint, match="missing, compressed or too short"):
        read_pickled([Pickled(tmp_path / "b.pt")])


@pytest.mark.parametrize("zip_format", [True, False])
def test_files_cut_short_anywhere(tmp_path: Path, zip_format: bool) -> None:
    torch.save({"w": torch.arange(100.0)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)
    whole = (tmp_path / "a.pt").read_bytes()
    cuts = []
    for cut in range(0, len(whole), 29):
        cuts.append(tmp_path / f"{cut}.pt")
        cuts[-1].write_bytes(whole[:cut])
    for file in cuts[:: max(1, len(cuts) // 12)]:
        with pytest.raises(CorruptCheckpoint):
            read_pickled([Pickled(file)])


def test_other_things_than_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "script.pt").write_bytes(zipped(tmp_path / "x", b"N.").read_bytes())
    for name in (tmp_path, Path("/dev/zero")):
        with pytest.raises(CorruptCheckpoint):
            read_pickled([Pickled(name)])


# ---------------------------------------------------------------- what is read, is read right


@pytest.mark.parametrize("zip_format", [True, False])
def test_every_kind_of_tensor_and_value(tmp_path: Path, zip_format: bool) -> None:
    base = torch.arange(24.0)
    tree = {
        "transposed": torch.randn(4, 6).t(), "strided": base[1::3], "expanded": torch.randn(3, 1).expand(3, 4),
        "scalar": torch.tensor(3, dtype=torch.int16), "empty": torch.empty(0, 3), "parameter": torch.nn.Parameter(base),
        "bf16": torch.randn(5).bfloat16(), "complex": torch.randn(2, dtype=torch.complex64), "bool": torch.tensor([True]),
    }  # fmt: skip
    if zip_format:
        tree |= {"u16": torch.tensor([1, 65535], dtype=torch.uint16), "f8": torch.randn(6).to(torch.float8_e4m3fn)}
    values = {
        "numpy": np.arange(6.0).reshape(2, 3), "np_scalar": np.int64(3), "size": torch.Size([2, 3]), 5: (1, [2.5, None]),
        "set": {1, 2}, "bytes": b"\x00\xff", "big": 10**30, "inf": float("inf"), "complex_value": 1 + 2j,
    }  # fmt: skip
    torch.save({**tree, **values}, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)
    found = read_pickled([Pickled(tmp_path / "a.pt")])[0]
    for name, tensor in tree.items():
        assert isinstance(found[name], FileTensor)
        stream = found[name].stream()
        octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert (stream.dtype, stream.shape) == (str(tensor.dtype)[6:], tuple(tensor.shape))
        assert bytes(stream.read(0, stream.nbytes)) == octets, name
        if stream.nbytes > 9:
            assert bytes(stream.read(3, 9)) == octets[3:9], name
    assert np.array_equal(found.pop("numpy"), values.pop("numpy"))
    assert {k: v for k, v in found.items() if k not in tree} == values


def test_a_pickle_beside_safetensors_is_never_opened(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "hf").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "hf" / "model.safetensors")
    torch.save({"w": torch.zeros(3), "x": command(tmp_path)}, tmp_path / "hf" / "pytorch_model.bin")
    torch.save(command(tmp_path), tmp_path / "hf" / "optimizer.pt")
    report = convert(tmp_path / "hf", tmp_path / "out")
    assert (report.source, report.tensors) == ("huggingface", 1)
    assert not (tmp_path / "ran").exists()
