"""The built-in evaluators on tiny models with random weights, made here: nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_support import WORDS, texts, tiny_bert, tiny_tokenizer

pytest.importorskip("transformers")
import sacrebleu
import transformers

from distckpt import CheckpointConfig, CheckpointManager, evaluate_checkpoints
from distckpt.errors import ConfigError, IncompatibleState
from distckpt.selection.cache import load_predictions
from distckpt.selection.data import evaluation_data, share_of
from distckpt.selection.ensemble import Ensemble, ensemble_predictions
from distckpt.selection.huggingface import LanguageModel, SequenceClassification, Translation

ROWS = texts(45)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """epoch_2, epoch_10: Hugging Face folders with tokenizer; run: the same weights as distckpt checkpoints."""
    top = tmp_path_factory.mktemp("bert")
    tiny_tokenizer(top / "tokenizer")
    config = CheckpointConfig(top / "run", preemption_signals=(), control_file=None, verbose=False)
    model = tiny_bert(0)
    with CheckpointManager(config, model=model) as manager:
        for epoch in (2, 10):
            model.load_state_dict(tiny_bert(epoch).state_dict())
            manager.save(step=epoch, model_config=json.loads(model.config.to_json_string()))
            model.save_pretrained(top / "hf" / f"epoch_{epoch}")
            tiny_tokenizer(top / "hf" / f"epoch_{epoch}")
    return top


def by_hand(model: Any, tokenizer: Any) -> np.ndarray:
    """Logits of each row alone."""
    found = []
    for row in ROWS:
        inputs = tokenizer(row["text"], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            found.append(model(**inputs).logits[0].numpy())
    return np.stack(found)


def test_a_folder_of_huggingface_folders(folders: Path, tmp_path: Path) -> None:
    found = evaluate_checkpoints(folders / "hf", SequenceClassification(), ROWS, results=tmp_path, batch_size=7)
    assert [(e.name, e.step) for e in found] == [("epoch_2", 2), ("epoch_10", 10)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "tokenizer")
    for one in found:
        logits = load_predictions(one).logits
        assert logits is not None
        np.testing.assert_allclose(logits, by_hand(tiny_bert(one.step), tokenizer), atol=1e-6)
    assert found[0].classes == ("NEGATIVE", "POSITIVE")
    labels = [{"negative": 0, "POSITIVE": 1, 1: 1, "0": 0}[row["label"]] for row in ROWS]
    assert found[0].support == {"NEGATIVE": labels.count(0), "POSITIVE": labels.count(1)}
    assert {"recall_negative", "precision_positive", "roc_auc", "pr_auc_negative", "loss", "macro_f1"} <= set(
        found[0].metrics
    )
    assert evaluate_checkpoints(folders / "hf", SequenceClassification(), ROWS, results=tmp_path, batch_size=7) == found


def test_distckpt_weights_give_the_same_bits(folders: Path, tmp_path: Path) -> None:
    hf = evaluate_checkpoints(folders / "hf", SequenceClassification(), ROWS, results=tmp_path)
    own = SequenceClassification(tokenizer=folders / "tokenizer")
    ours = evaluate_checkpoints(folders / "run", own, ROWS)
    from_folder = SequenceClassification(tokenizer=folders / "tokenizer", config=folders / "hf" / "epoch_2")
    theirs = evaluate_checkpoints(folders / "run", from_folder, ROWS)
    assert from_folder.version != own.version
    for a, b, c in zip(hf, ours, theirs, strict=True):
        assert a.metrics == b.metrics == c.metrics
        assert load_predictions(a).to_bytes() == load_predictions(b).to_bytes()


def test_random_weights_are_never_evaluated(folders: Path, tmp_path: Path) -> None:
    body = transformers.AutoModel.from_pretrained(folders / "hf" / "epoch_2")
    body.save_pretrained(tmp_path / "body")
    tiny_tokenizer(tmp_path / "body")
    with pytest.raises(IncompatibleState, match=r"no weights for \['classifier.bias', 'classifier.weight'\]"):
        evaluate_checkpoints(tmp_path / "body", SequenceClassification(), ROWS)
    with pytest.raises(ConfigError, match="no tokenizer in it"):
        evaluate_checkpoints(folders / "run", SequenceClassification(), ROWS)
    with pytest.raises(ConfigError, match="never fetched"):
        evaluate_checkpoints(folders / "run", SequenceClassification(tokenizer="bert-base-uncased"), ROWS)
    with pytest.raises(ConfigError, match="the model's classes are negative, positive"):
        evaluate_checkpoints(folders / "hf", SequenceClassification(), [{"text": "good", "label": "neutral"}])
    with pytest.raises(ConfigError, match="has text, label and no 'review'"):
        evaluate_checkpoints(folders / "hf", SequenceClassification(text="review"), ROWS)


def test_an_ensemble_of_models_is_that_of_their_predictions(folders: Path, tmp_path: Path) -> None:
    found = evaluate_checkpoints(folders / "hf", SequenceClassification(), ROWS, results=tmp_path)
    kept = [load_predictions(one) for one in found]
    data = evaluation_data(ROWS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "tokenizer")
    for average in ("probabilities", "logits"):
        live = Ensemble([tiny_bert(2), tiny_bert(10)], [3, 1], average)  # type: ignore[arg-type]
        ran = SequenceClassification().evaluate((live.eval(), tokenizer), share_of(data, 32, 0, 1))
        joined = ensemble_predictions(kept, [3, 1], average).scores()  # type: ignore[arg-type]
        np.testing.assert_allclose(ran.scores(), joined, atol=1e-6)  # type: ignore[arg-type]


def tiny_gpt(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=5 + len(WORDS), n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("gpt")
    for seed in (1, 2):
        tiny_gpt(seed).save_pretrained(top / f"checkpoint-{seed}")
        tiny_tokenizer(top / f"checkpoint-{seed}")
    return top


def test_perplexity_is_that_of_every_token(language_models: Path, tmp_path: Path) -> None:
    lines = [row["text"] for row in ROWS]
    found = evaluate_checkpoints(language_models, LanguageModel(), lines, results=tmp_path, batch_size=8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(language_models / "checkpoint-1")
    total, tokens, model = 0.0, 0, tiny_gpt(1)
    for line in lines:
        ids = tokenizer(line, truncation=True, max_length=16, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert found[0].n["perplexity"] == tokens
    assert found[0].metrics["loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert found[0].metrics["perplexity"] == pytest.approx(np.exp(total / tokens), rel=1e-6)
    ids = [{"input_ids": tokenizer(line, truncation=True, max_length=16)["input_ids"]} for line in lines]
    other = evaluate_checkpoints(language_models / "checkpoint-1", LanguageModel(), ids)
    assert other[0].metrics["loss"] == pytest.approx(total / tokens, rel=1e-6)


def test_an_ensemble_of_language_models(language_models: Path, tmp_path: Path) -> None:
    lines = [row["text"] for row in ROWS]
    kept = [
        load_predictions(one) for one in evaluate_checkpoints(language_models, LanguageModel(), lines, results=tmp_path)
    ]
    joined = ensemble_predictions(kept, [2, 1])
    live = Ensemble([tiny_gpt(1), tiny_gpt(2)], [2, 1]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(language_models / "checkpoint-1")
    ran = LanguageModel().evaluate((live, tokenizer), share_of(evaluation_data(lines), 32, 0, 1))
    np.testing.assert_allclose(ran.token_logprobs, joined.token_logprobs, atol=1e-5)  # type: ignore[arg-type]


def test_translation_is_scored_by_bleu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=5 + len(WORDS), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, pad_token_id=0,
        bos_token_id=2, eos_token_id=3, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    model.final_logits_bias[:, :5] = -100.0  # words, and nothing special
    model.save_pretrained(tmp_path / "bart")
    tiny_tokenizer(tmp_path / "bart")
    rows = [{"source": row["text"], "target": "the dress fits and it is very good"} for row in ROWS[:6]]
    evaluator = Translation(max_new_tokens=8)
    (found,) = evaluate_checkpoints(tmp_path / "bart", evaluator, rows, results=tmp_path / "results", batch_size=4)
    kept = load_predictions(found)
    assert found.n["bleu"] == 6
    assert kept.references == tuple(row["target"] for row in rows)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bart")
    for row, text in zip(rows, kept.texts or (), strict=True):
        ids = tokenizer(row["source"], truncation=True, max_length=16, return_tensors="pt")["input_ids"]
        alone = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
        assert text == tokenizer.decode(alone[0], skip_special_tokens=True)
        assert len(text.split()) == 8
    score = sacrebleu.corpus_bleu(list(kept.texts or ()), [list(kept.references or ())]).score
    assert found.metrics["bleu"] == pytest.approx(score, abs=1e-12)
