"""Makes the files of an export in a draft folder and asks every question about them. Nothing here publishes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from distckpt.dcp.leaves import torch_dtype
from distckpt.errors import ConfigError, DistckptError
from distckpt.export import behaviour, checks
from distckpt.export.artefact import GRAPHS, write_weights
from distckpt.export.behaviour import Scene, Side
from distckpt.export.candidates import recorded, reloaded
from distckpt.export.companions import companions
from distckpt.export.feeds import feed_of, make_batches, open_tokenizer
from distckpt.export.networks import Builder, builder_of, loaded, other_bits, tied_names, unstable_buffers
from distckpt.export.outcome import Check
from distckpt.export.plan import Plan, Proof, Trained
from distckpt.export.runners import signature_of
from distckpt.export.stream import stream_fingerprint
from distckpt.export.weights import CastNotes, Weights, cast_weights


def prove(plan: Plan, draft: Path) -> Proof:
    """Write the export into an empty folder and ask every question about it; the first answers that fail end it."""
    graph = plan.target.format in GRAPHS
    runs = graph or plan.model is not None or plan.data is not None or plan.target.format == "huggingface"
    builder = builder_of(plan.model, plan.config, plan.stored, where=plan.where) if runs else None
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
        proof.checks.append(
            Check("outputs on real rows", "skip", "no rows or no model were given; only bytes were compared")
        )
        companions(plan, proof, draft, None)
        return proof
    _about_model(plan, proof, trained)
    if not proof.failed:
        companions(plan, proof, draft, trained)
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
    proof.name_content(written)
    proof.checks += checks.sound_values(notes, plan.dtype)
    dtypes = checks.dtypes_of(proof.weights)
    proof.checks.append(checks.no_doubles(plan.means_doubles, dtypes))
    path, kind = plan.written(draft), plan.readable
    try:
        found = plan.reopen(path, kind)
        read = {name: stream_fingerprint(stream, plan.progress) for name, stream in found.tensors.items()}
        proof.checks.append(checks.same_weights(written, read, dtypes))
    except DistckptError as cause:
        proof.checks.append(Check("weights read back", "fail", f"it cannot be read back: {cause}"))


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
            side = recorded(plan, proof, trained, draft, notes)
        else:
            side = reloaded(plan, proof, trained, draft)
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
