"""Makes the files of an export in a draft folder and asks every question about them. Nothing here publishes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distckpt.dcp.leaves import torch_dtype
from distckpt.errors import ConfigError, DistckptError, optional
from distckpt.export import behaviour, checks
from distckpt.export.artefact import GRAPHS, Target, copy_tokenizer, write_config, write_weights
from distckpt.export.behaviour import Scene, Side
from distckpt.export.feeds import Batches, feed_of, make_batches, open_tokenizer
from distckpt.export.networks import Builder, builder_of, loaded, other_bits, tied_names, unstable_buffers
from distckpt.export.onnx import EMBED_BELOW, onnx_facts, open_onnx, write_onnx
from distckpt.export.outcome import Check, Latency, Port, failed
from distckpt.export.programs import (
    LEGACY,
    open_program,
    open_torchscript,
    record_program,
    write_program,
    write_torchscript,
)
from distckpt.export.runners import Plain, Signature, signature_of
from distckpt.export.stream import Progress, fingerprint, stream_fingerprint
from distckpt.export.weights import CastNotes, Weights, cast_weights
from distckpt.selection.data import EvaluationData
from distckpt.selection.evaluators import Evaluator
from distckpt.selection.metrics import Custom


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """What was asked for, opened and checked. ``limits``: tolerance, agreement, metric tolerance, or None each."""

    target: Target
    stored: Weights
    dtype: str | None
    model: Any
    config: Any
    tokenizer: Path | None
    tokenizer_wanted: bool
    data: EvaluationData | None
    inputs: Any
    evaluator: Evaluator | None
    metrics: Mapping[str, Custom]
    text: str
    max_length: int | None
    batch_size: int
    limits: tuple[float | None, float | None, float | None]
    benchmark: int
    max_shard_size: int
    external_data: bool | None
    stamp: Mapping[str, str]
    reopen: Callable[[Path, str], Weights]
    where: str
    progress: Progress


@dataclass(slots=True, eq=False)
class Proof:
    """Answers and figures so far."""

    weights: Weights
    dtype: str
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    content: str = ""
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    latency: list[Latency] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    baseline: dict[str, Any] = field(default_factory=dict)
    doubles: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a check failed already."""
        return bool(failed(self.checks))


@dataclass(slots=True, eq=False)
class Trained:
    """The trained model itself, on real rows where there are some."""

    builder: Builder
    module: nn.Module
    signature: Signature | None = None
    batches: Batches | None = None
    feed: Any = None
    tokenizer: Any = None


def prove(plan: Plan, draft: Path) -> Proof:
    """Write the export into an empty folder and ask every question about it; the first answers that fail end it."""
    graph = plan.target.format in GRAPHS
    builder = builder_of(plan.model, plan.config, plan.stored, where=plan.where)
    if graph and builder is None:
        raise ConfigError(
            f"{plan.target.format} needs the model: name a function that makes it (model=, --model pkg.mod:fn), or a "
            "transformers config (config=, --config)"
        )
    _need_tokenizer(plan, builder)
    trained = None if builder is None else _trained(builder, plan)
    stored = plan.stored if trained is None else _tied(plan.stored, trained.module)
    weights, notes = cast_weights(stored, plan.dtype)
    proof = Proof(weights, checks.main_dtype(weights))
    if trained is not None:
        proof.checks.append(checks.ties(other_bits(trained.module, plan.stored), tied_names(trained.module)))
    if not graph:
        _weights_alone(plan, proof, draft, notes)
    if proof.failed:
        return proof
    if trained is None:
        proof.checks.append(Check("outputs on real rows", "skip", "no model was given; only bytes were compared"))
        _companions(plan, proof, draft, None)
        return proof
    _about_model(plan, proof, trained)
    if not proof.failed:
        _companions(plan, proof, draft, trained)
        _candidate(plan, proof, trained, draft, notes)
    return proof


def _need_tokenizer(plan: Plan, builder: Builder | None) -> None:
    """Refuse a model of tokens whose tokenizer nobody named, where it is part of the promise or of the proof."""
    if plan.tokenizer is not None or builder is None or builder.huggingface is None or plan.inputs is not None:
        return
    told = (
        f"{plan.where}: {builder.name} takes tokens, and there is no tokenizer in the checkpoint; name a folder "
        "(tokenizer=, --tokenizer)"
    )
    if plan.target.format == "huggingface" and plan.tokenizer_wanted and plan.config.get("vocab_size"):
        raise ConfigError(f"{told}, or say that there is none (tokenizer=False, --no-tokenizer)")
    row = None if plan.data is None else plan.data.rows[0]
    if isinstance(row, str) or (isinstance(row, Mapping) and isinstance(row.get(plan.text), str)):
        raise ConfigError(told)


def _tied(stored: Weights, module: nn.Module) -> Weights:
    """Return the weights with the ties that the model has: stored under the names it stores, no others tied."""
    told = tied_names(module)
    if not set(stored.aliases) <= {*told, *told.values()}:
        stored = stored.untied()
    tensors, aliases = dict(stored.tensors), dict(stored.aliases)
    for alias, name in told.items():
        if alias in tensors and name in tensors:  # both names were stored; their bits are compared
            del tensors[alias]
            aliases[alias] = name
    return Weights(tensors, aliases, stored.prefix).written_under(list(told.values()))


def _trained(builder: Builder, plan: Plan) -> Trained:
    found = Trained(builder, loaded(builder, plan.stored, where=plan.where))
    if plan.data is None:
        return found
    if plan.tokenizer is not None:
        found.tokenizer = open_tokenizer(plan.tokenizer)
    found.feed = feed_of(
        found.module, plan.config, huggingface=builder.huggingface is not None, tokenizer=found.tokenizer,
        inputs=plan.inputs, max_length=plan.max_length, text=plan.text,
    )  # fmt: skip
    found.batches = make_batches(found.feed, plan.data.rows)
    dtype = torch_dtype(checks.main_dtype(plan.stored))
    found.signature = signature_of(found.module, found.batches.trace, found.feed.keywords, dtype)
    return found


# ---------------------------------------------------------------- weights alone


def _weights_alone(plan: Plan, proof: Proof, draft: Path, notes: CastNotes) -> None:
    written = write_weights(plan.target, draft, proof.weights, plan.stamp, plan.max_shard_size, plan.progress)
    _content(proof, written)
    proof.checks += checks.sound_values(notes, plan.dtype)
    dtypes = checks.dtypes_of(proof.weights)
    proof.checks.append(checks.no_doubles(_meant(plan), dtypes))
    path, kind = _main(plan, draft)
    try:
        found = plan.reopen(path, kind)
        read = {name: stream_fingerprint(stream, plan.progress) for name, stream in found.tensors.items()}
        proof.checks.append(checks.same_weights(written, read, dtypes))
    except DistckptError as cause:
        proof.checks.append(Check("weights read back", "fail", f"it cannot be read back: {cause}"))


def _main(plan: Plan, draft: Path) -> tuple[Path, str]:
    if plan.target.format == "huggingface":
        return draft, "huggingface"
    return draft / plan.target.main, "torch" if plan.target.format == "torch" else "huggingface"


def _meant(plan: Plan) -> bool:
    return plan.dtype == "float64" or any(s.dtype == "float64" for s in plan.stored.tensors.values())


def _content(proof: Proof, fingerprints: Mapping[str, str]) -> None:
    """Name the weights by one digest, the same in every format."""
    proof.content = fingerprint(proof.dtype, (), (f"{name} {print_}" for name, print_ in sorted(fingerprints.items())))


# ---------------------------------------------------------------- what lies beside


def _companions(plan: Plan, proof: Proof, draft: Path, trained: Trained | None) -> None:
    """Write config and tokenizer into a folder; of a Hugging Face folder they are part of the promise."""
    hugging = plan.target.format == "huggingface"
    usable = isinstance(plan.config, Mapping) and "model_type" in plan.config
    kind = trained.builder.huggingface if trained is not None else None
    if not plan.target.file and isinstance(plan.config, Mapping):
        write_config(draft, plan.config, dtype=proof.dtype, architecture=None if kind is None else kind.__name__)
    if hugging and not usable and plan.model is None:
        told = "no transformers config (with model_type): name a folder with config.json (config=, --config)"
        proof.checks.append(Check("config", "fail", told))
        return
    if plan.tokenizer is not None and not plan.target.file:
        copied = copy_tokenizer(plan.tokenizer, draft)
        proof.checks.append(_tokenizer(plan, draft, copied))


def _tokenizer(plan: Plan, draft: Path, copied: list[str]) -> Check:
    try:
        mine, source = open_tokenizer(draft), open_tokenizer(plan.tokenizer or draft)
    except ConfigError as cause:
        return Check("tokenizer", "fail", f"does not load from the export: {cause}")
    size = plan.config.get("vocab_size") if isinstance(plan.config, Mapping) else None
    if size is not None and len(mine) > size:
        return Check(
            "tokenizer", "fail", f"it has {len(mine)} tokens, the model's embedding {size}: it is another model's"
        )
    rows = plan.data.rows[:64] if plan.data is not None else []
    texts = [row if isinstance(row, str) else row.get(plan.text) for row in rows if isinstance(row, (str, Mapping))]
    texts = [one for one in texts if isinstance(one, str)]
    if any(mine(one)["input_ids"] != source(one)["input_ids"] for one in texts):
        return Check("tokenizer", "fail", "the copy gives other tokens than the original")
    return Check("tokenizer", "pass", f"{len(mine)} tokens, {len(copied)} files; same tokens on {len(texts)} texts")


# ---------------------------------------------------------------- the two models


def _about_model(plan: Plan, proof: Proof, trained: Trained) -> None:
    proof.checks.append(checks.buffers_outside(trained.module, unstable_buffers(trained.builder, trained.module)))
    if trained.batches is None or trained.signature is None:
        proof.checks.append(Check("outputs on real rows", "skip", "no rows were given (data=, --data)"))
        return
    run = behaviour.module_side(trained.module, trained.signature, trained.batches.trace).run
    proof.checks.append(checks.in_eval_mode(trained.module, run, trained.batches.several))
    if not proof.failed:
        proof.inputs, proof.outputs = behaviour.ports(trained.batches, trained.signature, run)
        call = behaviour.with_gradients(trained.module, trained.signature, trained.batches.trace)
        proof.checks.append(checks.unused_parameters(trained.module, call))


def _candidate(plan: Plan, proof: Proof, trained: Trained, draft: Path, notes: CastNotes) -> None:
    """Make (for graphs) or load what was exported, and compare it with the trained model."""
    side: Side | None
    try:
        if plan.target.format in GRAPHS:
            side = _graph(plan, proof, trained, draft, notes)
        else:
            side = _reloaded(plan, proof, trained, draft)
    except DistckptError as cause:
        proof.checks.append(Check("reload", "fail", str(cause)))
        return
    if proof.failed or side is None or trained.batches is None or trained.signature is None or plan.data is None:
        return
    name = trained.builder.name
    evaluator = plan.evaluator or behaviour.evaluator_for(name, plan.data, plan.text)
    scene = Scene(
        trained.feed, plan.data, trained.batches, evaluator, plan.metrics, plan.batch_size, trained.tokenizer
    )  # fmt: skip
    limits = checks.Limits.of((checks.main_dtype(plan.stored), proof.dtype), len(plan.data), *plan.limits)
    reference = behaviour.module_side(trained.module, trained.signature, trained.batches.trace)
    found = behaviour.compare(reference, side, scene, limits, name=plan.target.format, runs=plan.benchmark)
    proof.checks += found.checks
    proof.latency, proof.metrics, proof.baseline = found.latency, found.metrics, found.baseline


def _signature(plan: Plan, proof: Proof, trained: Trained) -> Signature:
    assert trained.signature is not None
    given = trained.signature
    return Signature(given.inputs, given.outputs, given.keywords, torch_dtype(proof.dtype))


def _reloaded(plan: Plan, proof: Proof, trained: Trained, draft: Path) -> Side | None:
    """Load the written weights into a new model: by transformers itself where it is a folder of its kind."""
    kind = trained.builder.huggingface
    if plan.target.format == "huggingface" and kind is not None:
        with _no_bars():
            module, told = kind.from_pretrained(draft, local_files_only=True, output_loading_info=True, dtype="auto")
        wrong = {
            name: sorted(map(str, told.get(name) or ()))
            for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        if any(wrong.values()):
            evidence = "; ".join(f"{name.replace('_', ' ')}: {keys[:3]}" for name, keys in wrong.items() if keys)
            proof.checks.append(Check("reload", "fail", f"from_pretrained: {evidence}"))
            return None
        names = getattr(module.config, "id2label", None) or {}
        proof.checks.append(_auto(kind, draft, names))
        proof.checks.append(
            _renamed(checks.same_state(proof.weights, module.state_dict(), partial=False), "loaded weights")
        )
    else:
        path, source = _main(plan, draft)
        module = loaded(trained.builder, plan.reopen(path, source), where=str(plan.target.path))
        _cast_fleeting(module, plan)
        proof.checks.append(
            Check("reload", "pass", f"loads into a new {trained.builder.name}, every name in its place")
        )
    if trained.signature is None or trained.batches is None:
        return None
    return behaviour.module_side(module.eval(), _signature(plan, proof, trained), trained.batches.trace)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers' progress bars out of ours."""
    logging = optional("transformers.utils.logging", "eval")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _auto(kind: Any, draft: Path, names: Mapping[int, str]) -> Check:
    """See that a stranger who has only the folder gets the same class."""
    transformers = optional("transformers", "eval")
    parsed = transformers.AutoConfig.from_pretrained(draft, local_files_only=True)
    told = f"from_pretrained gives {kind.__name__}, no key missing, unexpected or of another shape"
    if parsed.architectures != [kind.__name__]:
        return Check("reload", "fail", f"config.json says {parsed.architectures}, the model is a {kind.__name__}")
    labels = f"; classes {', '.join(str(names[k]) for k in sorted(names))}" if "Classification" in kind.__name__ else ""
    return Check("reload", "pass", told + labels)


def _renamed(check: Check, name: str) -> Check:
    return Check(name, check.status, check.evidence, check.values)


def _cast_fleeting(module: nn.Module, plan: Plan) -> None:
    """Cast buffers that no checkpoint has along with the weights, as ``module.to(dtype)`` would."""
    from distckpt.export.networks import fleeting_buffers

    if plan.dtype is not None:
        for buffer in fleeting_buffers(module).values():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(torch_dtype(plan.dtype))


def _graph(plan: Plan, proof: Proof, trained: Trained, draft: Path, notes: CastNotes) -> Side:
    """Record the computation with the cast weights, write it, load it again."""
    batches, form, path = trained.batches, plan.target.format, draft / plan.target.main
    assert batches is not None
    module = loaded(trained.builder, proof.weights, where=plan.where)
    if trained.builder.huggingface is None:
        _cast_fleeting(module, plan)
    else:
        module.config.use_cache = False  # type: ignore[union-attr]  # only logits are returned
    _content(proof, {name: stream_fingerprint(stream) for name, stream in proof.weights.tensors.items()})
    proof.checks += checks.sound_values(notes, plan.dtype)
    signature = _signature(plan, proof, trained)
    plain = Plain(module, signature).eval()
    if form == "torchscript":
        proof.notes.append(LEGACY)
        write_torchscript(plain, signature, batches, path)
        run, state = open_torchscript(path, signature)
    elif form == "pt2":
        write_program(record_program(plain, signature, batches)[0], path, plan.stamp)
        run, state = open_program(path, signature)
    else:
        big = proof.weights.nbytes >= EMBED_BELOW if plan.external_data is None else plan.external_data
        shapes = record_program(plain, signature, batches)[1]
        state = write_onnx(plain, signature, batches, shapes, path, external=big, stamp=plan.stamp)
        facts = onnx_facts(path)
        proof.doubles, proof.random = facts["doubles"], facts["random"]
        proof.notes.append(f"ONNX opset {facts['opset']}; run and checked by onnxruntime on the CPU")
        if facts["fixed"]:
            proof.checks.append(Check("free batch size", "fail", "; ".join(facts["fixed"])))
        run = open_onnx(path, signature)
    proof.checks.append(checks.same_state(proof.weights, state, partial=form == "onnx"))
    outputs = run(batches.single)
    doubles = [name for name, value in outputs.items() if value.dtype == torch.float64]
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}
    proof.checks.append(checks.no_doubles(_meant(plan), dtypes, proof.doubles, doubles))
    proof.checks.append(
        _renamed(checks.in_eval_mode(plain, run, batches.several, proof.random), "dropout off in the export")
    )
    return behaviour.graph_side(run, signature, getattr(trained.module, "config", plan.config))
