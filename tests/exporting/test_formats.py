"""Every format, read by the library that it is for and by nothing of distckpt: the same weights, the same outputs."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import run
from export_support import Small, by_name, exported, rows, saved, trained
from torch import nn

from distckpt import EMAModel, export_inference_checkpoint
from distckpt.errors import ConfigError

GRAPHS = ["pt2", "onnx", "torchscript"]


@pytest.fixture(scope="module")
def model() -> Small:
    found = trained()
    assert isinstance(found, Small)
    return found


@pytest.fixture(scope="module")
def root(model: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("run") / "run", model, model_config={"width": 8})


def expected(model: Small, x: torch.Tensor) -> torch.Tensor:
    """What the trained model says once it is in eval mode."""
    was = model.training
    with torch.no_grad():
        found: torch.Tensor = model.eval()(x)
    model.train(was)
    return found


def reader(to: str, path: Path) -> Callable[[torch.Tensor], Any]:
    if to == "safetensors":
        from safetensors.torch import load_model

        fresh = Small()
        load_model(fresh, path)
        return fresh.eval()
    if to == "torch":
        fresh = Small()
        fresh.load_state_dict(torch.load(path, weights_only=True))
        return fresh.eval()
    if to == "pt2":
        return torch.export.load(path).module()
    if to == "torchscript":
        return torch.jit.load(path)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("to", ["safetensors", "torch", *GRAPHS])
def test_it_does_the_same_in_its_own_library(root: Path, model: Small, tmp_path: Path, to: str) -> None:
    report = exported(root, tmp_path / "out", to, benchmark=3)
    name = next(name for name in report.files if name.startswith("model."))
    run = reader(to, tmp_path / "out" / name)
    for count in (1, 2, 7):
        x = torch.randn(count, 4)
        with torch.no_grad():
            assert torch.allclose(run(x), expected(model, x), atol=1e-5)
    assert [str(port) for port in (*report.inputs, *report.outputs)] == [
        "x: float32 [batch, 4]", "output: float32 [batch, 3]",
    ]  # fmt: skip
    # What is beside it says what is in it, and what was proved.
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {*told["files"], "export.json"}
    for file, facts in told["files"].items():
        assert facts["sha256"] == sha256((tmp_path / "out" / file).read_bytes()).hexdigest()
    assert {one["model"] for one in told["latency"]} == {"eager", to}
    assert all(0 < one["p50_ms"] <= one["p95_ms"] for one in told["latency"])
    assert told["metrics"]["trained"]["accuracy"] == told["metrics"]["exported"]["accuracy"]
    assert sum(told["baseline"]["predicted_share"].values()) == pytest.approx(1)
    names = {check.name for check in report.checks if check.status == "pass"}
    assert {
        "weights read back",
        "outputs on real rows",
        "same predictions",
        "same metric",
        "edge: batch of one",
    } <= names
    assert len(report.checklist) == 9
    assert {check.status for check in report.checklist} <= {"pass", "warn"}
    card = (tmp_path / "out" / "README.md").read_text()
    for needed in (
        report.version,
        "| in | x | float32 | batch × 4 |",
        "step",
        told["source"]["manifest"],
        "accuracy",
        "sha256",
    ):
        assert needed in card
    assert ("legacy" in card) is (to == "torchscript")
    # Recorded graphs carry stack traces, which name folders of this machine; only TorchScript cannot forget them.
    if to != "torchscript":
        assert str(Path(__file__).parent).encode() not in contents(tmp_path / "out" / name)
        assert str(Path(torch.__file__).parent).encode() not in contents(tmp_path / "out" / name)


def contents(path: Path) -> bytes:
    """All bytes of a file; of an archive those of its members."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


def test_onnx_weights_beside_the_file_travel_with_it(root: Path, model: Small, tmp_path: Path) -> None:
    report = exported(root, tmp_path / "out", "onnx", external_data=True)
    assert {"model.onnx", "model.onnx.data"} <= set(report.files)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    x = torch.randn(5, 4)
    assert torch.allclose(reader("onnx", tmp_path / "elsewhere" / "model.onnx")(x), expected(model, x), atol=1e-5)
    # As a single file too: its data has the file's own name.
    exported(root, tmp_path / "net.onnx", "onnx", external_data=True)
    assert {path.name for path in tmp_path.glob("net*")} == {
        "net.onnx",
        "net.onnx.data",
        "net.onnx.json",
        "net.onnx.md",
    }
    assert torch.allclose(reader("onnx", tmp_path / "net.onnx")(x), expected(model, x), atol=1e-5)


@pytest.mark.parametrize(("file", "to"), [("net.safetensors", "safetensors"), ("net.pt", "torch"), ("net.pt2", "pt2")])
def test_a_target_that_ends_like_a_file_is_one(root: Path, model: Small, tmp_path: Path, file: str, to: str) -> None:
    report = exported(root, tmp_path / file, None)  # type: ignore[arg-type]
    assert report.format == to
    assert {path.name for path in tmp_path.iterdir()} == {file, f"{file}.json", f"{file}.md"}
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.allclose(reader(to, tmp_path / file)(x), expected(model, x), atol=1e-6)


def test_weights_alone_need_no_model_and_say_what_was_not_asked(root: Path, tmp_path: Path) -> None:
    report = export_inference_checkpoint(root, tmp_path / "out.pt")
    assert by_name(report)["weights read back"].status == "pass"
    assert by_name(report)["outputs on real rows"].status == "skip"
    assert {check.status for check in report.checklist} == {"pass", "skip"}
    # The optimizer's two moments are gone; the sizes say it.
    assert report.sizes.left_out > report.sizes.kept
    assert 0 < report.sizes.reduction < 1
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert state["mix.weight"].data_ptr() == state["again.weight"].data_ptr()
    assert state["norm.num_batches_tracked"].dtype == torch.int64


def with_averages() -> tuple[nn.Module, EMAModel, EMAModel]:
    """Return a trained model with one average, and with two, none of which is its weights."""
    model = trained()
    ema, several = EMAModel(model, decay=0.5), EMAModel(model, decay=(0.5, 0.9))
    with torch.no_grad():
        model.up.weight.add_(1)  # type: ignore[operator, union-attr]
    ema.update()
    several.update()
    return model, ema, several


def test_the_average_instead_of_the_weights(tmp_path: Path) -> None:
    model, ema, several = with_averages()
    root = saved(tmp_path / "run", model, stateful={"ema": ema, "both": several})
    wanted = {name: value.clone() for name, value in ema.state_dict()["shadow"].items()}
    report = exported(root, tmp_path / "a.pt", "torch", ema="ema")
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(found["up.weight"], wanted["up.weight"])
    assert not torch.equal(found["up.weight"], model.state_dict()["up.weight"])
    assert set(found) == set(model.state_dict())  # what is only followed is there too, and the tie
    assert report.source["weights"] == "ema."
    assert exported(root, tmp_path / "b.pt", "torch", ema="0.9").source["weights"] == "both.0.9."
    for name in (True, "both", "other"):
        with pytest.raises(ConfigError, match=r"there are both\.0\.5, both\.0\.9, ema"):
            exported(root, tmp_path / "c.pt", "torch", ema=name)


def test_the_average_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, ema, several = with_averages()
    for name, parts, options in (("one", {"ema": ema}, ["--ema"]), ("both", {"both": several}, ["--ema-name", "0.9"])):
        root, out = saved(tmp_path / name, model, stateful=parts), tmp_path / f"{name}.pt"
        code, text, _ = run(capsys, "export", root, out, *options)
        assert code == 0, text
        average = ema if name == "one" else several
        with average.averaged("" if name == "one" else "0.9") as inside:
            wanted = inside.state_dict()["up.weight"].clone()
        assert torch.equal(torch.load(out, weights_only=True)["up.weight"], wanted)


def test_casts_touch_floating_tensors_alone(root: Path, model: Small, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16", "float64"):
        report = exported(root, tmp_path / f"{dtype}.pt", "torch", dtype=dtype)
        state = torch.load(tmp_path / f"{dtype}.pt", weights_only=True)
        own = model.state_dict()
        for name, value in state.items():
            wanted = own[name].to(getattr(torch, dtype)) if own[name].is_floating_point() else own[name]
            assert torch.equal(value, wanted), name
        assert by_name(report)["cast"].status == "pass"
        assert report.dtype == dtype
    assert report.content != exported(root, tmp_path / "same.pt", "torch").content


def test_the_same_weights_have_one_digest_in_every_format(root: Path, tmp_path: Path) -> None:
    found = {exported(root, tmp_path / to, to).content for to in ("safetensors", "torch", "torchscript")}
    assert len(found) == 1


def test_wrong_use_is_told_before_anything_is_read(root: Path, tmp_path: Path) -> None:
    for options, text in (
        ({"to": "gguf"}, "choose one of"),
        ({"to": "onnx", "data": None}, "needs rows"),
        ({"to": "pt2", "model": None, "config": {"width": 8}}, "needs the model"),
        ({"to": "torch", "dtype": "int8"}, "dtype='int8'"),
        ({"to": "torch", "model": "no.such:thing"}, "cannot be imported"),
        ({"to": "torch", "model": lambda: 3}, "not a torch.nn.Module"),
    ):
        with pytest.raises(ConfigError, match=text):
            exported(root, tmp_path / "out", **options)
    with pytest.raises(ConfigError, match="ends like a onnx file"):
        exported(root, tmp_path / "x.onnx", "pt2")
    assert list(tmp_path.iterdir()) == []


def test_rows_of_every_kind_reach_the_model(root: Path, tmp_path: Path) -> None:
    plain = [torch.tensor(row["x"]) for row in rows()]
    pairs = [(row["x"], row["y"]) for row in rows()]

    def own(some: Any) -> dict[str, torch.Tensor]:
        return {"x": torch.stack([torch.tensor(row["x"]) for row in some])}

    for number, options in enumerate(({"data": plain}, {"data": pairs}, {"data": rows(), "inputs": own})):
        report = exported(root, tmp_path / str(number), evaluator=None, **options)  # type: ignore[arg-type]
        assert by_name(report)["outputs on real rows"].status == "pass"
        assert by_name(report)["same metric"].status == "skip"
    with pytest.raises(ConfigError, match="the model takes x"):
        exported(root, tmp_path / "no", data=[{"z": 1.0}] * 4)
