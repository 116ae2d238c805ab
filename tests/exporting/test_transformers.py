"""Hugging Face folders as plain ``transformers`` loads them, and the traps of configs, tokenizers and tied weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import run
from evaluation_support import WORDS, texts, tiny_tokenizer
from export_support import by_name, saved

from distckpt import export_inference_checkpoint
from distckpt.errors import ConfigError, ExportRefused, IncompatibleState
from distckpt.export.outcome import Check

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("words") / "tokenizer")


@pytest.fixture(scope="module")
def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, initializer_range=0.5, id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def root(bert: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose config is the model's own, as ``to_dict`` gives it: without the name of its class."""
    config = bert.config.to_dict()
    assert not config.get("architectures")
    return saved(tmp_path_factory.mktemp("run") / "run", bert, model_config=config)


def gpt(tied: bool = True) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=27,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        tie_word_embeddings=tied,
        bos_token_id=2,
        eos_token_id=3,
    )
    return GPT2LMHeadModel(config).eval()


def refusal(*arguments: Any, **options: Any) -> dict[str, Check]:
    with pytest.raises(ExportRefused) as caught:
        export_inference_checkpoint(*arguments, **options)
    return {check.name: check for check in caught.value.checks if check.status == "fail"}


def test_a_classifier_comes_back_by_its_folder_alone(root: Path, bert: Any, tokenizer: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    report = export_inference_checkpoint(
        root, tmp_path / "out", tokenizer=tokenizer, data=texts(50), data_name="test", benchmark=0, max_shard_size=5_000
    )
    files = set(report.files)
    assert {"model.safetensors.index.json", "config.json", "vocab.txt"} <= files
    assert sum("-of-" in name for name in files) > 2
    shutil.move(tmp_path / "out", tmp_path / "moved")
    classify = pipeline("text-classification", model=str(tmp_path / "moved"), device="cpu")
    words = "very good dress and it fits"
    with torch.no_grad():
        encoded = AutoTokenizer.from_pretrained(tmp_path / "moved")(words, return_tensors="pt")
        wanted = bert(**encoded).logits.softmax(-1)[0]
    found = classify(words)[0]
    assert found["label"] in ("NEGATIVE", "POSITIVE")
    assert found["score"] == pytest.approx(float(wanted.max()), abs=1e-5)
    told = by_name(report)
    assert told["reload"].evidence.startswith("from_pretrained gives BertForSequenceClassification")
    assert told["edge: empty text"].status == told["edge: longest"].status == "pass"
    assert told["edge: longest"].evidence.startswith("1x16")
    assert set(told["outputs on real rows"].values["shapes"]) >= {"3x16", "8x16"}
    assert "accuracy" in report.metrics["exported"]
    assert [port.shape for port in report.inputs] == [("batch", "sequence")] * 3
    assert report.baseline["input_elements"]["p95"] == 16


def test_a_program_of_a_transformer_takes_any_batch_and_length(
    root: Path, bert: Any, tokenizer: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"tokenizer": tokenizer, "data": texts(30), "benchmark": 0}
    report = export_inference_checkpoint(root, tmp_path / "out", to="pt2", **options)
    extra = {"name": "", "step": ""}
    program = torch.export.load(tmp_path / "out" / "model.pt2", extra_files=extra)
    assert (extra["name"], extra["step"]) == ("run", "3")
    for shape in ((1, 2), (4, 16), (1, 1)):
        inputs = {
            "input_ids": torch.randint(0, 25, shape), "attention_mask": torch.ones(shape, dtype=torch.long),
            "token_type_ids": torch.zeros(shape, dtype=torch.long),
        }  # fmt: skip
        with torch.no_grad():
            assert torch.allclose(program.module()(**inputs), bert(**inputs).logits, atol=1e-6)
    assert by_name(report)["same metric"].status == "pass"


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_written_once_and_come_back_tied(tied: bool, tokenizer: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = gpt(tied)
    root = saved(tmp_path / "run", model, model_config=model.config.to_dict())
    report = export_inference_checkpoint(root, tmp_path / "out", tokenizer=tokenizer, data=texts(20), benchmark=0)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert ({"transformer.wte.weight", "lm_head.weight"} <= names) is not tied
    assert "transformer.wte.weight" in names  # the name that the library loads
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (again.lm_head.weight is again.transformer.wte.weight) is tied
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert report.metrics["exported"]["perplexity"] == pytest.approx(report.metrics["trained"]["perplexity"])
    assert by_name(report)["reload"].evidence.startswith("from_pretrained gives GPT2LMHeadModel")


def test_a_missing_tokenizer_and_one_of_another_model(root: Path, tokenizer: Path, tmp_path: Path) -> None:
    for more in ({}, {"to": "pt2", "data": texts(4)}):
        with pytest.raises(ConfigError, match="there is no tokenizer in the checkpoint"):
            export_inference_checkpoint(root, tmp_path / "out", **more)
    assert export_inference_checkpoint(root, tmp_path / "none", tokenizer=False).ok
    large = shutil.copytree(tokenizer, tmp_path / "large")
    content = json.loads((large / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"word{i}": 25 + i for i in range(9)}
    (large / "tokenizer.json").write_text(json.dumps(content))
    wrong = refusal(root, tmp_path / "out", tokenizer=large)
    assert wrong["tokenizer"].evidence.startswith("it has 34 tokens, the model's embedding 25")
    with pytest.raises(ConfigError, match="no such folder"):
        export_inference_checkpoint(root, tmp_path / "out", tokenizer=tmp_path / "nowhere", data=texts(4))
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_not_this_models(root: Path, bert: Any, tmp_path: Path) -> None:
    right = bert.config.to_dict()
    for change, text in (
        ({"hidden_size": 64}, r"is \[25, 16\] in the checkpoint and \[25, 64\] in the model"),
        ({"num_hidden_layers": 3}, "no weights for"),
        ({"id2label": {0: "a", 1: "b", 2: "c"}}, "classifier"),
        ({"architectures": ["BertForMaskedLM"]}, "no weights for|have no place"),
    ):
        with pytest.raises(IncompatibleState, match=text):
            export_inference_checkpoint(root, tmp_path / "out", config={**right, **change}, tokenizer=False)
    with pytest.raises(ConfigError, match="model_type 'nonesuch'"):
        export_inference_checkpoint(root, tmp_path / "out", config={"model_type": "nonesuch"}, tokenizer=False)
    assert "no transformers config" in refusal(root, tmp_path / "out", config={"width": 3})["config"].evidence
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_transformers_itself_is_a_source(bert: Any, tokenizer: Path, tmp_path: Path) -> None:
    bert.save_pretrained(tmp_path / "source")
    shutil.copytree(tokenizer, tmp_path / "source", dirs_exist_ok=True)
    report = export_inference_checkpoint(
        tmp_path / "source", tmp_path / "out", dtype="float16", data=texts(20), benchmark=0
    )
    assert {"vocab.txt", "tokenizer.json"} <= set(report.files)
    assert report.dtype == json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert by_name(report)["loaded weights"].status == "pass"
    assert 0.2 < report.sizes.reduction < 0.6


# ---------------------------------------------------------------- the command


def test_the_command(root: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "test.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts(20)))
    arguments = ("export", root, tmp_path / "out", "--data", rows, "--benchmark", 3, "--version", "1.2.0")
    code, _, err = run(capsys, *arguments)
    assert (code, "there is no tokenizer" in err) == (2, True)
    code, out, err = run(capsys, *arguments, "--tokenizer", tokenizer, "--dtype", "float16", "--tolerance", 0)
    assert (code, "Nothing was written" in err) == (1, True)
    assert "problem  outputs on real rows" in out
    assert not (tmp_path / "out").exists()
    code, out, _ = run(capsys, *arguments, "--tokenizer", tokenizer)
    assert code == 0
    for needed in (
        "version 1.2.0",
        "smaller",
        "outputs on real rows",
        "before deployment",
        "Monitoring",
        "p95 ms",
        "eager",
    ):
        assert needed in out, needed
    code, out, _ = run(capsys, *arguments, "--tokenizer", tokenizer, "--replace", "--json")
    told = json.loads(out)
    assert (code, told["ok"], told["version"], told["data"]["name"]) == (0, True, "1.2.0", "test")
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    code, _, err = run(capsys, *arguments, "--tokenizer", tokenizer)
    assert (code, "is there already" in err) == (2, True)
    worse = ("--no-tokenizer", "--dtype", "float16", "--json", "--config", tmp_path / "nowhere")
    assert run(capsys, "export", root, tmp_path / "bad", *worse)[0] == 2
    code, out, _ = run(capsys, *arguments[:2], tmp_path / "bad", *arguments[3:], "--tokenizer", tokenizer, "--tolerance", 0,
                       "--dtype", "float16", "--json")  # fmt: skip
    assert (code, json.loads(out)["ok"]) == (1, False)
    code, _, err = run(capsys, "export", root, tmp_path / "bad", "--ema")
    assert (code, "there are none" in err) == (2, True)


def test_the_command_with_a_model_by_import_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from export_support import trained

    root = saved(tmp_path / "run", trained())
    path = tmp_path / "net.ts"
    options = (
        "--model",
        "export_support:Small",
        "--data",
        "export_support:rows",
        "--evaluator",
        "export_support:accuracy",
    )
    code, out, err = run(capsys, "export", root, path, *options, "--benchmark", 0)
    assert (code, path.exists()) == (0, True), err
    assert "note: TorchScript is a legacy format" in out
    code, _, err = run(capsys, "export", root, tmp_path / "no.ts", *options[:-1], "export_support:nothing")
    assert (code, "cannot be imported" in err) == (2, True)
