"""What goes wrong in exports, one trap each: every one is refused by the check that is there for it, and leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import export_support as nets
import pytest
import torch
from export_support import Small, accuracy, by_name, exported, refused, saved, trained
from torch import nn

from distckpt.export import artefact, checks, feeds, networks, stream
from distckpt.export.checks import Limits
from distckpt.export.weights import choose_weights, ema_prefix

LIMITS = Limits(1e-4, 1.0, 1e-4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("run") / "run", trained())


# ---------------------------------------------------------------- the model's own traps


def test_dropout_that_knows_no_mode(root: Path, tmp_path: Path) -> None:
    wrong = refused(root, tmp_path / "out", model=nets.AlwaysDropped)
    assert "dropout without training=self.training" in wrong["dropout off"].evidence


def test_a_factory_that_leaves_the_model_in_training(root: Path, tmp_path: Path) -> None:
    found = exported(root, tmp_path / "out", "torchscript", model=lambda: Small().train())
    assert by_name(found)["dropout off in the export"].status == "pass"
    assert not torch.jit.load(tmp_path / "out" / "model.ts").training


def test_a_part_left_in_training_is_seen() -> None:
    model = Small().eval()
    model.drop.train()
    answer = checks.in_eval_mode(model, lambda inputs: inputs, {})
    assert (answer.status, answer.evidence) == ("fail", "in training mode: drop")


def test_a_batch_size_that_the_trace_kept(root: Path, tmp_path: Path) -> None:
    wrong = refused(root, tmp_path / "out", "torchscript", nets.OneBatch)
    assert "batch of one (1x4)" in wrong["outputs on real rows"].evidence


@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_a_batch_size_that_the_program_would_fix(root: Path, tmp_path: Path, to: str) -> None:
    wrong = refused(root, tmp_path / "out", to, nets.ThreeRowsOnly)
    assert "one size only: batch = 3" in wrong["reload"].evidence


def test_float64_that_nobody_trained_in(root: Path, tmp_path: Path) -> None:
    wrong = refused(root, tmp_path / "out", "onnx", nets.Doubled)
    assert "output (inside the graph)" in wrong["no float64"].evidence
    wrong = refused(root, tmp_path / "out", "torchscript", nets.Doubled)
    assert "output (an output)" in wrong["no float64"].evidence


def test_a_buffer_that_no_checkpoint_has(root: Path, tmp_path: Path) -> None:
    wrong = refused(root, tmp_path / "out", "pt2", nets.RandomTable)
    assert "table: not saved (persistent=False)" in wrong["buffers outside the checkpoint"].evidence
    # One that the code always fills alike is no trap, and goes along in the graph.
    found = exported(root, tmp_path / "out", "pt2", nets.FixedTable)
    assert "table (1)" in by_name(found)["buffers outside the checkpoint"].evidence


def test_a_tie_that_the_checkpoint_has_not(tmp_path: Path) -> None:
    root = saved(tmp_path / "run", trained(nets.Untied))
    wrong = refused(root, tmp_path / "out.pt", "torch")
    assert wrong["tied weights"].evidence.startswith("again.weight and mix.weight are one tensor in the model")
    found = exported(root, tmp_path / "out.pt", "torch", nets.Untied)
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert not torch.equal(state["again.weight"], state["mix.weight"])
    assert found.tensors == len(state)


def test_a_tie_that_the_model_has_not(root: Path, tmp_path: Path) -> None:
    """Stored once because it was tied then; this model wants two, which start equal."""
    exported(root, tmp_path / "out.pt", "torch", nets.Untied)
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert state["again.weight"].data_ptr() != state["mix.weight"].data_ptr()


def test_layers_that_nothing_uses_are_named(tmp_path: Path) -> None:
    model = nets.Idle()
    found = exported(saved(tmp_path / "run", model), tmp_path / "out", model=nets.Idle)
    assert by_name(found)["unused layers"].status == "warn"
    assert by_name(found)["unused layers"].values["names"] == ["spare.weight", "spare.bias"]
    assert {one.name: one.status for one in found.checklist}["Nothing unused is left"] == "warn"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Linear(4, 3), "no weights for .*'bias'|have no place in it"),
        (lambda: nn.Sequential(Small()), "no weights for"),
        (nets.Idle, r"no weights for \['spare.weight', 'spare.bias'\]"),
    ],
)
def test_another_model_is_refused_by_name(root: Path, tmp_path: Path, make: Any, text: str) -> None:
    from distckpt.errors import IncompatibleState

    with pytest.raises(IncompatibleState, match=text):
        exported(root, tmp_path / "out", model=make)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- values and casts


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        model.get_parameter("down.bias")[1] = float("nan")
    wrong = refused(saved(tmp_path / "run", model), tmp_path / "out")
    assert wrong["finite weights"].evidence.startswith("NaN in down.bias (1)")


def test_a_cast_that_overflows(tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        model.get_parameter("down.bias")[1] = 70_000
    root = saved(tmp_path / "run", model)
    assert "down.bias (1) overflow in float16" in refused(root, tmp_path / "out", dtype="float16")["cast"].evidence
    exported(root, tmp_path / "out", dtype="bfloat16")


def test_a_cast_that_changes_what_the_model_says(tmp_path: Path) -> None:
    """Differences of outputs are within what bfloat16 may do; the predictions are not."""
    torch.manual_seed(0)
    root = saved(tmp_path / "run", nets.Cancelling())
    exported(root, tmp_path / "fine", model=nets.Cancelling)
    wrong = refused(root, tmp_path / "out", model=nets.Cancelling, dtype="bfloat16")
    assert set(wrong) == {"same predictions"}
    wrong = refused(root, tmp_path / "out", model=nets.Cancelling, dtype="bfloat16", agreement=0.0)
    assert set(wrong) == {"same metric"}
    wrong = refused(root, tmp_path / "out", model=nets.Cancelling, dtype="bfloat16", tolerance=1e-6)
    assert set(wrong) == {"outputs on real rows"}
    told: dict[str, Any] = {"dtype": "bfloat16", "agreement": 0.0, "evaluator": None}
    assert exported(root, tmp_path / "wanted", model=nets.Cancelling, **told).ok


# ---------------------------------------------------------------- the writing itself


def test_a_byte_that_was_written_wrongly(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = artefact.write_weights

    def wrong(target: Any, folder: Path, *rest: Any) -> dict[str, str]:
        found = right(target, folder, *rest)
        path = folder / target.main
        octets = bytearray(path.read_bytes())
        at = octets.find(b"\x3f", len(octets) // 2)
        octets[at] ^= 1
        path.write_bytes(octets)
        return found

    monkeypatch.setattr("distckpt.export.proof.write_weights", wrong)
    for to in ("safetensors", "torch", "huggingface"):
        answer = refused(root, tmp_path / "out", to)["weights read back"]
        assert "differs (1 in all)" in answer.evidence or "cannot be read back" in answer.evidence


def test_a_weight_that_the_graph_changed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distckpt.export import programs

    right = programs.own_names

    def wrong(state: Any) -> Any:
        return {name: value + 1e-6 if name == "down.bias" else value for name, value in right(state).items()}

    monkeypatch.setattr("distckpt.export.programs.own_names", wrong)
    assert refused(root, tmp_path / "out", "pt2")["weights read back"].evidence == "down.bias differs (1 in all)"


def test_a_metric_that_changed_alone(root: Path, tmp_path: Path) -> None:
    """Predictions on the rows that are compared one by one are equal; the metric over all rows is not."""
    calls = []

    def drifting(model: Any, rows: Any) -> Any:
        calls.append(1)
        return {"recall": 0.9 - 0.01 * len(calls)}

    wrong = refused(root, tmp_path / "out", evaluator=drifting)
    assert "recall 0.89 became 0.88" in wrong["same metric"].evidence


# ---------------------------------------------------------------- what lies there already


def test_a_failed_export_loses_nothing_of_an_earlier_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distckpt.errors import ConfigError

    first = exported(root, tmp_path / "out", version="1.0")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="is there already"):
        exported(root, tmp_path / "out")
    refused(root, tmp_path / "out", model=nets.AlwaysDropped, replace_existing=True)

    def full(source: Any, target: Any) -> None:
        if not str(target).endswith(".old") and ".tmp" in str(source):
            raise OSError(28, "No space left on device")
        right(source, target)

    right = stream.os.rename
    with monkeypatch.context() as patch:
        patch.setattr(stream.os, "rename", full)
        with pytest.raises(OSError, match="No space left"):
            exported(root, tmp_path / "out", replace_existing=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert first.version == "1.0"
    exported(root, tmp_path / "out", version="2.0", replace_existing=True)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["version"] == "2.0"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_are_replaced_together_or_not_at_all(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(root, tmp_path / "net.pt", "torch", version="1.0")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    right = stream.os.rename

    def last_fails(source: Any, target: Any) -> None:
        if str(target).endswith("net.pt") and ".tmp" in str(source):
            raise OSError(5, "Input/output error")
        right(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(stream.os, "rename", last_fails)
        with pytest.raises(OSError, match="Input/output"):
            exported(root, tmp_path / "net.pt", "torch", version="2.0", replace_existing=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    exported(root, tmp_path / "net.pt", "torch", version="2.0", replace_existing=True)
    assert set(before) == {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "net.pt.json").read_text())["version"] == "2.0"


def test_what_is_no_export_is_never_replaced(root: Path, tmp_path: Path) -> None:
    from distckpt.errors import ConfigError

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "net.pt").write_text("somebody's")
    for target in ("mine", "net.pt"):
        with pytest.raises(ConfigError, match="is no earlier export"):
            exported(root, tmp_path / target, "torch", replace_existing=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "net.pt").read_text() == "somebody's"


# ---------------------------------------------------------------- the parts, alone


def fixed(*values: float) -> Any:
    return lambda inputs: {"output": torch.tensor([values] * len(inputs["x"]))}


def batches(rows: int = 4) -> feeds.Batches:
    found = feeds.make_batches(feeds.ArrayFeed(("x",)), [{"x": [float(i)]} for i in range(rows)])
    assert found.axes == {"x": ("batch", None)}
    return found


def test_edge_cases_where_only_one_side_answers() -> None:
    def never_none(inputs: Any) -> Any:
        if not len(inputs["x"]):
            raise ValueError("want at least one row")
        return fixed(1.0, 0.0)(inputs)

    def never_one(inputs: Any) -> Any:
        if len(inputs["x"]) == 1:
            raise ValueError("specialised")
        return fixed(1.0, 0.0)(inputs)

    def answers(mine: Any, theirs: Any) -> dict[str, str]:
        return {one.name: one.status for one in checks.edge_cases(mine, theirs, batches(), LIMITS)}

    assert answers(fixed(1.0, 0.0), fixed(1.0, 0.0)) == {"edge: batch of one": "pass", "edge: zero rows": "pass"}
    assert answers(fixed(1.0, 0.0), never_one)["edge: batch of one"] == "fail"
    assert answers(fixed(1.0, 0.0), never_none)["edge: zero rows"] == "warn"
    assert answers(never_none, never_none)["edge: zero rows"] == "pass"
    assert answers(never_none, fixed(1.0, 0.0))["edge: zero rows"] == "warn"


@pytest.mark.parametrize(
    ("mine", "theirs", "wrong"),
    [
        ((1.0, 0.0), (1.0, 0.00001), None),
        ((1.0, 0.0), (1.0, 0.01), "outputs on real rows"),
        ((1.0, 0.0), (1.0, float("nan")), "outputs on real rows"),
        ((1.0, 0.0), (1.0, 0.0, 0.0), "outputs on real rows"),
        ((0.00001, 0.0), (0.0, 0.00001), "same predictions"),
    ],
)
def test_outputs_are_compared_by_size_shape_and_choice(mine: Any, theirs: Any, wrong: str | None) -> None:
    found = checks.same_outputs(fixed(*mine), fixed(*theirs), batches(), LIMITS)
    assert next((one.name for one in found if one.status == "fail"), None) == wrong


def test_axes_take_their_names_from_what_varies() -> None:
    def inputs(rows: int, tokens: int, frames: int) -> dict[str, torch.Tensor]:
        shapes = {"ids": (rows, tokens), "mask": (rows, tokens), "sound": (rows, frames, 5)}
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    found = feeds.axes_of([(1, inputs(1, 3, 7)), (2, inputs(2, 9, 8)), (3, inputs(3, 9, 7))])
    assert found == {"ids": ("batch", "sequence"), "mask": ("batch", "sequence"), "sound": ("batch", "axis_2", None)}
    with pytest.raises(ValueError, match="does not count rows"):
        feeds.axes_of([(1, {"x": torch.zeros(3, 1)}), (2, {"x": torch.zeros(3, 2)})])


def test_names_lose_their_wrappers_and_never_meet() -> None:
    from distckpt.errors import IncompatibleState

    def tensor(size: int) -> stream.Stream:
        return stream.Stream("uint8", (size,), lambda start, stop: bytes(stop - start))

    found = choose_weights(
        {"model._orig_mod.a": tensor(1), "optim.x": tensor(2)}, {"model.module.b": "model._orig_mod.a"}
    )
    assert (list(found.tensors), found.aliases) == (["a"], {"b": "a"})
    with pytest.raises(IncompatibleState, match="two tensors are called 'a'"):
        choose_weights({"model.a": tensor(1), "model._orig_mod.a": tensor(1)}, {})
    with pytest.raises(IncompatibleState, match=r"names start with \['model\.'\]"):
        choose_weights({"model.a": tensor(1)}, {}, "ema.")
    assert found.written_under(["b"]).aliases == {"a": "b"}


def test_averages_are_found_by_what_they_are_called() -> None:
    from distckpt.errors import ConfigError

    objects = {"ema": {"averages": {"": {}}, "updates": 3}, "scheduler": {"averages": 3}}
    assert [ema_prefix(objects, name) for name in ("", "ema")] == ["ema.", "ema."]
    objects = {"slow": {"averages": {"0.9": {}, "0.99": {}}, "updates": 3}}
    assert [ema_prefix(objects, name) for name in ("0.9", "slow.0.99")] == ["slow.0.9.", "slow.0.99."]
    with pytest.raises(ConfigError, match="there are none"):
        ema_prefix({}, "ema")


def test_a_builder_is_called_as_it_wants() -> None:
    weights = choose_weights({"model.weight": stream.Stream("float32", (3, 4), lambda a, b: bytes(b - a))}, {})
    for factory in (lambda: nn.Linear(4, 3, bias=False), lambda config: nn.Linear(config["in"], 3, bias=False)):
        builder = networks.builder_of(factory, {"in": 4}, weights, where="here")
        assert builder is not None
        assert networks.misfit(builder.make(), weights) is None
    assert networks.builder_of(None, {"in": 4}, weights, where="here") is None


def test_the_evaluator_of_these_tests_is_sound() -> None:
    """``accuracy`` is what the metric checks of this file rest on."""
    from distckpt.selection.data import evaluation_data, share_of

    data = evaluation_data(nets.rows(9))
    found = accuracy(lambda x: torch.eye(3)[torch.tensor([row["y"] for row in nets.rows(9)])], share_of(data, 4, 0, 1))
    assert (found.chosen() == found.labels).all()
