"""DCP folders, torch.save files, Hugging Face folders and distckpt itself: in, out and back, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli_support
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from distckpt.cli.main import main
from distckpt.errors import CheckpointNotFound, ConfigError, CorruptCheckpoint, IncompatibleState
from distckpt.format.checkpoint import open_checkpoint
from distckpt.importers.convert import convert, kind_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.gain = nn.Parameter(torch.randn(5).bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(x))) * self.gain.sum().float()


def trained() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(3)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.25)
    for _ in range(2):
        net(torch.randint(0, 13, (8,))).square().mean().backward()
        optimizer.step()
    return net, optimizer


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def check_optimizer(root: Path, optimizer: torch.optim.Optimizer, net: nn.Module) -> None:
    found = open_checkpoint(root)
    for name, parameter in net.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(found.read(f"optim.state.{name}.{key}"), value), (name, key)
    (group,) = found.objects["optim.param_groups"]
    assert group["lr"] == 0.25
    assert group["params"] == [name for name, _ in net.named_parameters()]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Net, torch.optim.Optimizer]:
    """A distckpt root with model, optimizer, scheduler, per-rank RNG states and a config."""
    from distckpt import CheckpointConfig, CheckpointManager

    root = tmp_path_factory.mktemp("native") / "run"
    net, optimizer = trained()
    config = CheckpointConfig(root, preemption_signals=(), verbose=False)
    with CheckpointManager(config, model=net, optimizer=optimizer) as manager:
        manager.resume()
        manager.save(epoch=1, step=5, metrics={"loss": 2.5}, model_config={"width": 6, "layers": [1, 2]})
    return root, net, optimizer


# ---------------------------------------------------------------- in


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_state_dict(tmp_path: Path, zip_format: bool) -> None:
    net, _ = trained()
    torch.save(net.state_dict(), tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)
    report = convert(tmp_path / "a.pt", tmp_path / "out", step=7)
    assert (report.source, report.step, report.aliases) == ("torch", 7, 1)
    found = open_checkpoint(tmp_path / "out")
    same(found.state_dict(), net.state_dict())
    assert found.manifest.aliases == {"model.head.weight": "model.embed.weight"}
    assert found.provenance["imported_from"] == "torch"
    assert found.provenance["name"] == "a.pt"
    assert str(tmp_path) not in json.dumps(found.provenance)


def test_large_tensors_that_begin_within_a_page(tmp_path: Path) -> None:
    """A request fills its buffer to the end, wherever in a page of the file it begins."""
    state = {"odd": torch.arange(1025, dtype=torch.float32), "large": torch.arange(5 << 20).float()}
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out")
    same(open_checkpoint(tmp_path / "out").state_dict(), state)


def test_a_nested_file_with_a_numbered_optimizer(tmp_path: Path) -> None:
    net, optimizer = trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    state = {
        "model": {f"module.{k}": v for k, v in net.state_dict().items()}, "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(), "epoch": 4, "step": 11, "args": {"width": 6}, "rng": torch.get_rng_state(),
    }  # fmt: skip
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    same(found.state_dict(), net.state_dict())
    check_optimizer(tmp_path / "out", optimizer, net)
    assert (found.step, found.epoch, found.objects["args"]) == (11, 4, {"width": 6})
    assert found.objects["scheduler"]["step_size"] == 10
    assert torch.equal(found.read("rng"), state["rng"])


def test_numbers_that_fit_no_parameter_are_refused(tmp_path: Path) -> None:
    net, _ = trained()
    groups = [{"params": [net.gain]}, {"params": [net.embed.weight, *net.norm.parameters()]}]
    torch.save({"model": net.state_dict(), "optimizer": torch.optim.SGD(groups, 0.1).state_dict()}, tmp_path / "a.pt")
    with pytest.raises(IncompatibleState, match="--no-optimizer"):
        convert(tmp_path / "a.pt", tmp_path / "out")
    convert(tmp_path / "a.pt", tmp_path / "out", optimizer=False)
    same(open_checkpoint(tmp_path / "out").state_dict(), net.state_dict())


def test_names_that_begin_with_model_keep_it(tmp_path: Path) -> None:
    torch.save({"model.w": torch.ones(2)}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out")
    assert list(open_checkpoint(tmp_path / "out").tensors) == ["model.model.w"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_dcp_folder(tmp_path: Path, wrapped: bool) -> None:
    net, optimizer = trained()
    model_state, optim_state = get_state_dict(net, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optim_state, "epoch": 3}
    dcp.save({"app": state} if wrapped else state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    convert(tmp_path / "dcp", tmp_path / "out")
    same(open_checkpoint(tmp_path / "out").state_dict(), model_state)
    check_optimizer(tmp_path / "out", optimizer, net)
    assert open_checkpoint(tmp_path / "out").objects["epoch"] == 3


def test_a_dcp_folder_in_chunks(tmp_path: Path) -> None:
    """Chunks along either dimension, as ranks would have written them."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    whole = {"model.rows": torch.randn(7, 3), "model.columns": torch.randn(4, 6, 2), "model.one": torch.tensor(2.0)}
    cuts = {
        "model.rows": [((0, 0), (3, 3)), ((3, 0), (4, 3))],
        "model.columns": [((0, 0, 0), (4, 1, 2)), ((0, 1, 0), (4, 5, 1)), ((0, 1, 1), (4, 5, 1))],
        "model.one": [((), ())],
    }

    class Planner(DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            items = []
            for fqn, boxes in cuts.items():
                for offsets, sizes in boxes:
                    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(whole[fqn]), whole[fqn].size())
                    items.append(WriteItem(MetadataIndex(fqn, offsets), WriteItemType.SHARD, tensor_data=data))
            self.plan = SavePlan(items)
            return self.plan

        def lookup_object(self, index: MetadataIndex) -> Any:
            offsets, sizes = next(c for c in cuts[index.fqn] if c[0] == tuple(index.offset or ()))
            return whole[index.fqn][tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].clone()

    dcp.save(dict(whole), checkpoint_id=tmp_path / "dcp", planner=Planner(flatten_state_dict=False), no_dist=True)
    convert(tmp_path / "dcp", tmp_path / "out")
    same({f"model.{n}": t for n, t in open_checkpoint(tmp_path / "out").state_dict().items()}, whole)


def huggingface(folder: Path, state: dict[str, torch.Tensor], *, suffix: str, shards: int) -> None:
    folder.mkdir()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    write = save_file if suffix == "safetensors" else torch.save
    names = sorted(state)
    if shards == 1:
        write(state, folder / f"{stem}.{suffix}")
    else:
        weight_map = {}
        for i in range(shards):
            file = f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}"
            write({n: state[n] for n in names[i::shards]}, folder / file)
            weight_map |= dict.fromkeys(names[i::shards], file)
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "net", "width": 6}')


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_huggingface_folder(tmp_path: Path, suffix: str, shards: int) -> None:
    state = {k: v.clone() for k, v in trained()[0].state_dict().items() if k != "head.weight"}
    huggingface(tmp_path / "hf", state, suffix=suffix, shards=shards)
    assert kind_of(tmp_path / "hf") == "huggingface"
    convert(tmp_path / "hf", tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    same(found.state_dict(), state)
    assert found.config == {"model_type": "net", "width": 6}


def test_an_index_that_lies(tmp_path: Path) -> None:
    huggingface(tmp_path / "hf", {"a": torch.ones(2), "b": torch.ones(3)}, suffix="safetensors", shards=2)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for weight_map, error in (
        ({**content["weight_map"], "c": "model-00001-of-00002.safetensors"}, "'c'"),
        ({"a": "../model-00001-of-00002.safetensors"}, "weight_map"),
        ({"a": "absent.safetensors"}, "absent"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises((CorruptCheckpoint, CheckpointNotFound), match=error):
            convert(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- out, and back


def test_to_a_torch_file(tmp_path: Path, native: tuple[Path, Net, torch.optim.Optimizer]) -> None:
    root, net, optimizer = native
    convert(root, tmp_path / "weights.pt", to="torch")
    for mapped in (False, True):
        found = torch.load(tmp_path / "weights.pt", weights_only=True, mmap=mapped)
        same(found, net.state_dict())
        assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    convert(root, tmp_path / "all.pt", to="torch", optimizer=True)
    everything = torch.load(tmp_path / "all.pt", weights_only=True)
    assert everything["optim"]["param_groups"][0]["lr"] == 0.25
    assert torch.equal(everything["optim"]["state"]["gain"]["exp_avg"], optimizer.state[net.gain]["exp_avg"])
    convert(tmp_path / "all.pt", tmp_path / "back")
    same(open_checkpoint(tmp_path / "back").state_dict(), net.state_dict())
    check_optimizer(tmp_path / "back", optimizer, net)
    with pytest.raises(ConfigError, match="is there already"):
        convert(root, tmp_path / "all.pt", to="torch")


def test_dtypes_that_torch_files_keep_in_their_newer_form(tmp_path: Path) -> None:
    state = {
        "u16": torch.tensor([1, 65535], dtype=torch.uint16), "f8": torch.randn(6).to(torch.float8_e5m2),
        "c64": torch.randn(2, dtype=torch.complex64), "empty": torch.empty(0, 2), "one": torch.tensor(True),
    }  # fmt: skip
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "b.pt", to="torch")
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in state.items()}
    octets = [{n: t.reshape(-1).view(torch.uint8).tolist() for n, t in s.items()} for s in (found, state)]
    assert octets[0] == octets[1]


def test_to_a_plain_dcp_folder(tmp_path: Path, native: tuple[Path, Net, torch.optim.Optimizer]) -> None:
    root, net, optimizer = native
    convert(root, tmp_path / "dcp", to="dcp")
    other = Net()
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1.0)
    model_state, optim_state = get_state_dict(other, other_optimizer)
    dcp.load({"model": model_state, "optim": optim_state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    same(model_state, get_state_dict(net, ())[0])
    assert torch.equal(optim_state["state"]["gain"]["exp_avg_sq"], optimizer.state[net.gain]["exp_avg_sq"])
    assert optim_state["param_groups"][0]["lr"] == 0.25
    convert(tmp_path / "dcp", tmp_path / "back")
    same(open_checkpoint(tmp_path / "back").state_dict(), net.state_dict())
    check_optimizer(tmp_path / "back", optimizer, net)


def test_to_a_huggingface_folder(tmp_path: Path, native: tuple[Path, Net, torch.optim.Optimizer]) -> None:
    root, net, _ = native
    report = convert(root, tmp_path / "hf", to="huggingface", max_shard_size=150)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = {file: load_file(tmp_path / "hf" / file) for file in set(index["weight_map"].values())}
    assert len(files) > 1
    found = {name: files[file][name] for name, file in index["weight_map"].items()}
    expected = {name: tensor for name, tensor in net.state_dict().items() if name != "head.weight"}
    same(found, expected)
    assert sum(map(len, files.values())) == report.tensors == len(expected)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == {"width": 6, "layers": [1, 2]}
    convert(tmp_path / "hf", tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    same(back.state_dict(), net.state_dict())
    assert back.manifest.aliases == {"model.head.weight": "model.embed.weight"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf"]


def test_a_single_huggingface_file_has_its_usual_name(tmp_path: Path, native: Any) -> None:
    convert(native[0], tmp_path / "hf", to="huggingface")
    names = sorted(p.name for p in (tmp_path / "hf").iterdir())
    assert names == ["config.json", "model.safetensors", "model.safetensors.index.json"]


def test_a_copy_keeps_everything(tmp_path: Path, native: tuple[Path, Net, torch.optim.Optimizer]) -> None:
    root = native[0]
    convert(root, tmp_path / "copy")
    before, after = open_checkpoint(root), open_checkpoint(tmp_path / "copy")
    same(after.state_dict(prefix=""), before.state_dict(prefix=""))
    assert after.objects == before.objects
    assert (after.step, after.epoch, after.metrics, after.config) == (5, 1, {"loss": 2.5}, before.config)
    assert after.manifest.per_rank == before.manifest.per_rank == ["rng"]
    assert repr(after.rank_objects(0)) == repr(before.rank_objects(0))


def test_many_shards(tmp_path: Path, native: tuple[Path, Net, torch.optim.Optimizer]) -> None:
    net = native[1]
    torch.save(net.state_dict(), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out", max_shard_size=200)
    found = open_checkpoint(tmp_path / "out")
    assert found.world_size == len(found.manifest.shards) > 2
    same(found.state_dict(), net.state_dict())
    assert found.verify("full").ok


def test_a_store_that_takes_only_rising_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distckpt.storage import open_store

    store = open_store("memory://rising")
    monkeypatch.setattr(type(store), "capabilities", replace(store.capabilities, random_write=False), raising=False)
    offsets: list[int] = []
    original = type(store).open_writer

    def watched(self: Any, name: str, size: int) -> Any:
        writer = original(self, name, size)
        write = writer.write_at
        writer.write_at = lambda offset, data: (offsets.append(offset), write(offset, data))[1]  # type: ignore[method-assign]
        return writer

    monkeypatch.setattr(type(store), "open_writer", watched)
    state = {f"w{i}": torch.randn(1 << 20) for i in range(5)}
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", "memory://rising")
    assert len(offsets) > 2
    assert offsets == sorted(offsets)
    same(open_checkpoint("memory://rising").state_dict(), state)


# ---------------------------------------------------------------- refusals


def test_a_root_with_a_newer_step_is_left_alone(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out", step=10)
    with pytest.raises(ConfigError, match="step 10"):
        convert(tmp_path / "a.pt", tmp_path / "out", step=10)
    convert(tmp_path / "a.pt", tmp_path / "out", step=11)
    assert open_checkpoint(tmp_path / "out").manifest.generation == 2


def test_what_was_written_wrongly_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that says another dtype than it was given."""
    from distckpt.export import huggingface as writer

    torch.save({"w": torch.ones(64)}, tmp_path / "a.pt")
    original = writer._header

    def wrong(*args: Any) -> bytes:
        return original(*args).replace(b'"F32"', b'"I32"')

    monkeypatch.setattr(writer, "_header", wrong)
    with pytest.raises(CorruptCheckpoint, match="does not read back as written"):
        convert(tmp_path / "a.pt", tmp_path / "hf", to="huggingface")
    assert not (tmp_path / "hf").exists()


def test_nothing_there_and_nothing_known(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound):
        convert(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="of no kind"):
        convert(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ConfigError, match="--to"):
        convert(tmp_path / "empty", tmp_path / "out", to="onnx")


# ---------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "out"), "--step", "3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["source"], shown["target"], shown["step"], shown["verified"]) == ("torch", "distckpt", 3, True)
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    assert "every byte read back" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "hf"), "--to", "huggingface"]) == 2
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "x"), "--max-shard-size", "lots"]) == 2
    assert main(["convert", str(tmp_path / "no"), str(tmp_path / "x")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_a_step_of_a_root(tmp_path: Path) -> None:
    cli_support.build(tmp_path / "run")
    assert convert(tmp_path / "run", tmp_path / "old", step=200).step == 200
    assert convert(tmp_path / "run", tmp_path / "new").step == 600
