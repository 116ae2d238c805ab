"""What was exported, as something to run: weights in a new model, or a recorded graph, each loaded from the draft."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distckpt.dcp.leaves import torch_dtype
from distckpt.errors import optional
from distckpt.export import behaviour, checks
from distckpt.export.behaviour import Side
from distckpt.export.networks import fleeting_buffers, loaded
from distckpt.export.onnx import EMBED_BELOW, onnx_facts, open_onnx, write_onnx
from distckpt.export.outcome import Check
from distckpt.export.plan import Plan, Proof, Trained
from distckpt.export.programs import (
    LEGACY,
    open_program,
    open_torchscript,
    record_program,
    write_program,
    write_torchscript,
)
from distckpt.export.runners import Plain, Signature
from distckpt.export.stream import stream_fingerprint
from distckpt.export.weights import CastNotes


def _signature(plan: Plan, proof: Proof, trained: Trained) -> Signature:
    assert trained.signature is not None
    given = trained.signature
    return Signature(given.inputs, given.outputs, given.keywords, torch_dtype(proof.dtype))


def reloaded(plan: Plan, proof: Proof, trained: Trained, draft: Path) -> Side | None:
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
        module = loaded(trained.builder, plan.reopen(plan.written(draft), plan.readable), where=str(plan.target.path))
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
    if plan.dtype is not None:
        for buffer in fleeting_buffers(module).values():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(torch_dtype(plan.dtype))


def recorded(plan: Plan, proof: Proof, trained: Trained, draft: Path, notes: CastNotes) -> Side:
    """Record the computation with the cast weights, write it, load it again."""
    batches, form, path = trained.batches, plan.target.format, draft / plan.target.main
    assert batches is not None
    module = loaded(trained.builder, proof.weights, where=plan.where)
    if trained.builder.huggingface is None:
        _cast_fleeting(module, plan)
    else:
        module.config.use_cache = False  # type: ignore[union-attr]  # only logits are returned
    proof.name_content({name: stream_fingerprint(stream) for name, stream in proof.weights.tensors.items()})
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
    proof.checks.append(checks.no_doubles(plan.means_doubles, dtypes, proof.doubles, doubles))
    proof.checks.append(
        _renamed(checks.in_eval_mode(plain, run, batches.several, proof.random), "dropout off in the export")
    )
    return behaviour.graph_side(run, signature, getattr(trained.module, "config", plan.config))
