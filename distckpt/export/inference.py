"""``export_inference_checkpoint``: the weights of one checkpoint in a format that others run, published once it is proved.

This module opens checkpoints of any kind, so it counts as a later layer than the writers beside it. Order of work: choose
and cast the weights (streams), write into a draft folder, read back, run both models on real rows, write card and report,
publish by rename. A failed check ends it before anything has its final name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from distckpt import clock
from distckpt.engines.base import MODEL
from distckpt.errors import ConfigError, ExportRefused
from distckpt.export.artefact import GRAPHS, Target, target_of
from distckpt.export.card import card_text, checklist
from distckpt.export.huggingface import MAX_SHARD
from distckpt.export.outcome import FORMAT, Check, ExportReport, Sizes, failed, plain
from distckpt.export.plan import Plan, Proof
from distckpt.export.proof import prove
from distckpt.export.stream import Progress, draft_folder, publish
from distckpt.export.weights import Weights, choose_weights, ema_prefix
from distckpt.format.digest import digest
from distckpt.importers.convert import kind_of, open_source
from distckpt.importers.source import Options, Source
from distckpt.selection.data import evaluation_data, import_object
from distckpt.selection.evaluators import evaluator_of

_HASHED: Final = 1 << 20


def export_inference_checkpoint(
    checkpoint: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str | None = None,
    step: int | None = None,
    kind: str = "auto",
    prefix: str = MODEL,
    ema: str | bool | None = None,
    dtype: str | None = None,
    model: Callable[..., Any] | str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    tokenizer: str | os.PathLike[str] | bool | None = None,
    data: Any = None,
    data_name: str | None = None,
    inputs: Callable[[Sequence[Any]], Any] | str | None = None,
    evaluator: Any = None,
    metrics: Mapping[str, Any] | None = None,
    text: str = "text",
    max_length: int | None = None,
    batch_size: int = 32,
    tolerance: float | None = None,
    agreement: float | None = None,
    metric_tolerance: float | None = None,
    benchmark: int = 20,
    max_shard_size: int = MAX_SHARD,
    external_data: bool | None = None,
    version: str | None = None,
    name: str | None = None,
    replace_existing: bool = False,
    progress: Progress = lambda nbytes: None,
) -> ExportReport:
    """Export the weights of a checkpoint for inference, prove that they still do the same, and publish them whole.

    ``checkpoint``: anything ``distckpt convert`` reads: a root (its newest), a step's folder, an average, DeepSpeed, DCP,
    Hugging Face, ``torch.save``. ``prefix``: which weights; ``ema``: those that ``EMAModel`` saved, True for the only ones,
    else their name (``"ema"``, ``"0.999"``). ``to``: ``huggingface`` (a folder ``from_pretrained`` loads), ``safetensors``,
    ``torch`` (a state dict), ``pt2`` (``torch.export``), ``onnx``, ``torchscript`` (legacy). ``target``: a folder, or a file
    with the ending of its format, whose report and card lie beside it. ``dtype``: floating weights are cast to it.

    ``model``: a function that returns the module, or its import path; called with the config if it takes an argument.
    Without it the class comes from ``config`` (a dict or a folder with ``config.json``; default: the checkpoint's own), if
    that is one of transformers. Graphs (``pt2``, ``onnx``, ``torchscript``) need a model, and ``data`` to record it with.
    ``tokenizer``: a folder; False for a model that has none. ``data``: see ``evaluation_data``; with it outputs at several
    shapes, predictions, the metric and edge cases are compared, and latency is measured (``benchmark`` calls, 0 for none).
    ``inputs``: rows to tensors, ``fn(rows) -> {name: tensor}``, for models without a tokenizer whose rows are not arrays.
    ``evaluator``, ``metrics``: as in ``evaluate_checkpoints``; found by itself for classifiers and language models.
    ``tolerance``, ``agreement``, ``metric_tolerance``: see ``checks.Limits``. ``external_data``: ONNX weights beside
    the file (default: from 1 GiB on). ``replace_existing``: an earlier export is replaced, after the new one has passed.

    ``safetensors`` and ``torch`` are streamed (memory: a few chunks) where neither ``model`` nor ``data`` is given; all else
    holds the trained and the exported model.
    Raises ``ExportRefused`` with every answer if a check fails, and then leaves nothing behind; ``ConfigError`` for
    wrong use; what opening the checkpoint raises; ``IncompatibleState`` where the model does not fit.
    """
    where = target_of(Path(target), to)
    _free(where, replace_existing)
    if where.format in GRAPHS and data is None:
        raise ConfigError(f"to={where.format!r} records the computation, so it needs rows: give data= (--data)")
    source = _open(checkpoint, kind, step)
    if ema is not None and ema is not False:
        prefix = ema_prefix(source.objects, "" if ema is True else ema, where=source.path)
    stored = choose_weights(source.tensors, source.aliases, prefix, where=source.path)
    plan = Plan(
        target=where,
        stored=stored,
        dtype=dtype,
        model=import_object(model) if isinstance(model, str) else model,
        config=_config(config, source),
        tokenizer=_tokenizer(tokenizer, source),
        tokenizer_wanted=tokenizer is not False,
        data=None if data is None else evaluation_data(data, data_name),
        inputs=import_object(inputs) if isinstance(inputs, str) else inputs,
        evaluator=None if evaluator is None else evaluator_of(evaluator),
        metrics={n: import_object(one) if isinstance(one, str) else one for n, one in (metrics or {}).items()},
        text=text,
        max_length=max_length,
        batch_size=batch_size,
        limits=(tolerance, agreement, metric_tolerance),
        benchmark=benchmark,
        max_shard_size=max_shard_size,
        external_data=external_data,
        stamp=_stamp(source, prefix, version, name),
        reopen=_reopen,
        where=source.path,
        progress=progress,
    )
    where.path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with draft_folder(where.path.absolute()) as draft:
        proof = prove(plan, draft)
        _refuse_failed(proof.checks, source.path, where)
        report = _report(plan, proof, source, draft, name or source.name, version)
        (draft / where.card).write_text(card_text(report, plan.config, name or source.name), encoding="utf-8")
        files = {**report.files, where.card: _facts(draft / where.card)}
        report = replace(report, files=files)
        text_of_report = json.dumps(report.to_json(), indent=2, allow_nan=False)
        (draft / where.report).write_text(text_of_report + "\n", encoding="utf-8")
        _publish(where, draft)
    return report


# ---------------------------------------------------------------- what is exported


def _open(checkpoint: str | os.PathLike[str], kind: str, step: int | None) -> Source:
    known = kind_of(checkpoint) if kind == "auto" else kind
    several = known in ("distckpt", "deepspeed", "universal")
    if step is not None and not several:
        raise ConfigError(f"step={step}: {os.fspath(checkpoint)} is one checkpoint of kind {known}, without steps")
    return open_source(checkpoint, known, Options(step=step, optimizer=known == "distckpt"))


def _reopen(path: Path, kind: str) -> Weights:
    """Open what was written as any reader of its kind would."""
    source = open_source(path, kind, Options(optimizer=False))
    return choose_weights(source.tensors, source.aliases, MODEL, where=os.fspath(path))


def _config(config: Any, source: Source) -> Any:
    if not isinstance(config, (str, os.PathLike)):
        return source.config if config is None else config
    file = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ConfigError(f"config {os.fspath(config)}: no config.json can be read there: {cause}") from cause


def _tokenizer(tokenizer: Any, source: Source) -> Path | None:
    if tokenizer is None and source.kind == "huggingface":
        folder = Path(source.path) if os.path.isdir(source.path) else Path(source.path).parent
        return folder if any(folder.glob("tokenizer*")) else None
    return None if tokenizer is None or isinstance(tokenizer, bool) else Path(tokenizer)


def _stamp(source: Source, prefix: str, version: str | None, name: str | None) -> dict[str, str]:
    from distckpt import __version__

    step = "" if source.step is None else str(source.step)
    found = {"name": name or source.name, "version": version or "", "step": step, "weights": prefix}
    return {n: v for n, v in found.items() if v} | {
        "exported_by": f"distckpt {__version__}",
        "exported": clock.utc_text(),
    }


# ---------------------------------------------------------------- the report


def _refuse_failed(checks: Sequence[Check], path: str, target: Target) -> None:
    wrong = failed(list(checks))
    if wrong:
        told = "; ".join(f"{check.name}: {check.evidence}" for check in wrong[:3])
        raise ExportRefused(f"{path} to {target.format}: {told}. Nothing was written to {target.path}", tuple(checks))


def _report(plan: Plan, proof: Proof, source: Source, draft: Path, name: str, version: str | None) -> ExportReport:
    weights = proof.weights
    files = {path.name: _facts(path) for path in sorted(draft.iterdir())}
    original = _original_bytes(source)
    kept = plan.stored.nbytes
    exported = sum(fact["bytes"] for fact in files.values())
    report = ExportReport(
        path=str(plan.target.path),
        format=plan.target.format,
        version=version or f"{name}+{proof.content[:12]}",
        created=plan.stamp["exported"],
        files=files,
        source=_provenance(source, plan.stored.prefix),
        content=proof.content,
        dtype=proof.dtype,
        tensors=len(weights.tensors),
        parameters=sum(_numel(stream.shape) for stream in weights.tensors.values()),
        sizes=Sizes(original, exported, kept, max(0, original - kept)),
        inputs=proof.inputs,
        outputs=proof.outputs,
        checks=tuple(proof.checks),
        checklist=(),
        latency=tuple(proof.latency),
        metrics=proof.metrics,
        data=None if plan.data is None else plain(plan.data.id),
        baseline=proof.baseline,
        software=_software(plan),
        notes=tuple(dict.fromkeys([*source.notes, *proof.notes])),
    )
    return replace(report, checklist=checklist(report))


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _facts(path: Path) -> dict[str, Any]:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASHED):
            state.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": state.hexdigest()}


def _original_bytes(source: Source) -> int:
    """Return the bytes of the whole checkpoint: its shards, or every file of a folder."""
    if source.checkpoint is not None:
        return sum(shard.size for shard in source.checkpoint.manifest.shards)
    path = Path(source.path)
    files = (path,) if path.is_file() else tuple(path.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def _provenance(source: Source, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": source.kind, "name": source.name, "step": source.step, "epoch": source.epoch, "weights": prefix,
        "metrics": plain(source.metrics),
    }  # fmt: skip
    checkpoint = source.checkpoint
    if checkpoint is not None:
        manifest = checkpoint.store.read(checkpoint.committed.manifest_path)
        found |= {
            "manifest": digest(manifest),
            "generation": checkpoint.generation,
            "world_size": checkpoint.world_size,
            "saved": checkpoint.manifest.time,
            "made_from": plain(_origin(checkpoint.provenance)),
        }
    return found


def _origin(provenance: Any) -> Any:
    """Return what a checkpoint was resumed or averaged from; the job's settings are no origin."""
    if not isinstance(provenance, Mapping):
        return provenance
    return {name: value for name, value in provenance.items() if name != "settings" and value is not None}


def _software(plan: Plan) -> dict[str, str]:
    from importlib import metadata

    names = ["distckpt", "torch", "safetensors"]
    names += {"onnx": ["onnx", "onnxscript", "onnxruntime"], "huggingface": ["transformers"]}.get(
        plan.target.format, []
    )
    return {name: metadata.version(name) for name in names}


# ---------------------------------------------------------------- publishing


def _sidecars(target: Target) -> list[Path]:
    path = target.path.absolute()
    return [path.with_name(name) for name in (f"{target.main}.data", target.card, target.report)]


def _free(target: Target, replace_existing: bool) -> None:
    """Refuse a target in use; with ``replace_existing`` only one that is no export."""
    path = target.path
    taken = [one for one in ((path, *_sidecars(target)) if target.file else (path,)) if os.path.lexists(one)]
    if not taken or (path.is_dir() and not path.is_symlink() and not target.file and not any(path.iterdir())):
        return
    if not replace_existing:
        raise ConfigError(f"{taken[0]}: is there already; name a new target, or ask to replace it (--replace)")
    report = path.absolute().with_name(target.report) if target.file else path / target.report
    try:
        ours = json.loads(report.read_text(encoding="utf-8"))["kind"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    folders = [] if target.file else [one for one in path.iterdir() if one.is_dir()]
    if not ours or folders or path.is_symlink():
        raise ConfigError(f"{path}: is no earlier export ({report.name} does not say so), so it is never replaced")


def _publish(target: Target, draft: Path) -> None:
    path = target.path.absolute()
    if not target.file:
        publish([(draft, path)])
        return
    known = {target.main, target.card, target.report, f"{target.main}.data"}
    names = [one.name for one in sorted(draft.iterdir()) if one.name in known]
    names.sort(key=lambda one: one == target.main)  # the model's own file comes last
    publish([(draft / one, path.with_name(one)) for one in names])
