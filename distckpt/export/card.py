"""The model card, and the deployment checklist: eight questions, each answered from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from distckpt.export.outcome import Check, ExportReport, Port, Sizes, Status

_MARK: Final = {"pass": "✓", "fail": "✗", "warn": "!", "skip": "–"}


def checklist(report: ExportReport) -> tuple[Check, ...]:
    """Return what has to be true before a model is deployed, each with its evidence."""
    by_name = {check.name: check for check in report.checks}

    def from_checks(title: str, *names: str, nothing: str) -> Check:
        found = [by_name[name] for name in names if name in by_name]
        order: Sequence[Status] = ("fail", "warn", "pass", "skip")
        status: Status = next((s for s in order if any(check.status == s for check in found)), "skip")
        told = "; ".join(f"{check.name}: {check.evidence}" for check in found if check.status == status)
        return Check(title, status, told or nothing)

    edges = [name for name in by_name if name.startswith("edge: ")]
    no_model = "the model did not run: give it (--model, --config) and rows (--data)"
    sizes = report.sizes
    return (
        from_checks("Dropout is off", "dropout off", "dropout off in the export", nothing=no_model),
        from_checks("Nothing unused is left", "unused layers", nothing=no_model),
        _latency(report),
        from_checks(
            "Output quality is proved", "weights read back", "outputs on real rows", "same predictions", "same metric",
            nothing=no_model,
        ),
        from_checks("Edge cases are tested", *edges, nothing=no_model),
        Check("Input and output are documented", "pass", "; ".join(map(str, (*report.inputs, *report.outputs))))
        if report.inputs
        else Check("Input and output are documented", "skip", no_model),
        Check("The model has a version", "pass", f"{report.version}; weights {report.content[:16]}; a sha256 for every file"),
        _monitoring(report),
        Check("Training state is gone", "pass", f"{size_text(sizes.left_out)} of optimizer and other state left out"),
    )  # fmt: skip


def _latency(report: ExportReport) -> Check:
    if not report.latency:
        return Check("Latency is measured", "skip", "not measured: give rows (--data), and no --benchmark 0")
    told = [f"{one.model}, {one.rows} rows: p50 {one.p50_ms:.2f} ms, p95 {one.p95_ms:.2f} ms" for one in report.latency]
    return Check("Latency is measured", "pass", "; ".join(told))


def _monitoring(report: ExportReport) -> Check:
    shares = report.baseline.get("predicted_share")
    if not report.baseline:
        return Check("Monitoring has a baseline", "skip", "no rows were given to take one from")
    told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items()) if shares else "sizes of inputs"
    return Check("Monitoring has a baseline", "pass", f"{told}; alarms are yours to set up, on drift from these")


def size_text(nbytes: int) -> str:
    """Return bytes as the seed's reports do, in MiB."""
    return f"{nbytes / 2**20:.1f} MiB"


def sizes_text(sizes: Sizes) -> str:
    """Return the size reduction in one line."""
    return f"{size_text(sizes.original)} -> {size_text(sizes.exported)}, {sizes.reduction:.1%} smaller"


# ---------------------------------------------------------------- the card


def card_text(report: ExportReport, config: Any, name: str) -> str:
    """Return the card as Markdown with the front matter that model hubs read."""
    library = {"huggingface": "transformers", "onnx": "onnx"}.get(report.format, "pytorch")
    parts = [
        f"---\nlibrary_name: {library}\ntags:\n- distckpt\n---\n",
        f"# {_text(name)}\n",
        _headline(report),
        "## How to use it\n",
        _usage(report, config),
        "## Input and output\n",
        _ports(report.inputs, report.outputs),
        "## Where it comes from\n",
        _mapping({k: v for k, v in report.source.items() if k != "metrics" and v is not None}),
        "## Metrics\n",
        _metrics(report),
        "## Proof\n",
        "Each question was answered before anything was published; `!` is true but worth knowing, `–` could not be asked.\n",
        _checks(report.checks),
        "## Deployment checklist\n",
        _checks(report.checklist),
        "## Speed and size\n",
        f"{sizes_text(report.sizes)}.\n",
        _speeds(report),
        "## Baseline for monitoring\n",
        _mapping(report.baseline) if report.baseline else "None: no rows were given.\n",
        "## Files\n",
        _table(("file", "bytes", "sha256"), [(n, f["bytes"], f["sha256"]) for n, f in report.files.items()]),
        "## Limits\n",
        "".join(f"- {_text(note)}\n" for note in _limits(report)),
    ]
    return "\n".join(parts)


def _headline(report: ExportReport) -> str:
    made = f"Version `{_text(report.version)}`, exported {report.created} as {report.format}."
    return f"{made} {report.tensors} tensors, {report.parameters:,} parameters, {report.dtype}.\n"


def _usage(report: ExportReport, config: Any) -> str:
    main = next(
        (n for n in report.files if n.endswith((".safetensors", ".pt", ".pth", ".bin", ".pt2", ".onnx", ".ts"))),
        "model",
    )
    kind = next(
        (c.evidence.split()[2].rstrip(",") for c in report.checks if c.name == "reload" and "gives" in c.evidence), None
    )
    names = [port.name for port in report.inputs]
    call = ", ".join(names) or "inputs"
    tokenizer = "tokenizer = AutoTokenizer.from_pretrained(folder)\n" if any("token" in n for n in report.files) else ""
    code = {
        "huggingface": f"from transformers import AutoTokenizer, {kind or 'AutoModel'}\n\n{tokenizer}"
        f"model = {kind or 'AutoModel'}.from_pretrained(folder)  # in eval mode",
        "safetensors": f"from safetensors.torch import load_model\n\nload_model(model, \"{main}\")\nmodel.eval()",
        "torch": f"model.load_state_dict(torch.load(\"{main}\", weights_only=True))\nmodel.eval()",
        "pt2": f"model = torch.export.load(\"{main}\").module()\noutputs = model({_call(names, config)})",
        "onnx": f"session = onnxruntime.InferenceSession(\"{main}\")\n"
        f"outputs = session.run(None, {{{', '.join(f'{n!r}: {n}' for n in names)}}})",
        "torchscript": f"model = torch.jit.load(\"{main}\")\noutputs = model({call})",
    }[report.format]  # fmt: skip
    return f"```python\n{code}\n```\n"


def _call(names: Sequence[str], config: Any) -> str:
    hugging = isinstance(config, Mapping) and "model_type" in config
    return ", ".join(f"{name}={name}" if hugging else name for name in names)


def _ports(inputs: Sequence[Port], outputs: Sequence[Port]) -> str:
    if not inputs:
        return "Not recorded: the model did not run (no rows were given).\n"
    rows = [
        (way, p.name, p.dtype, " × ".join(map(str, p.shape)))
        for way, ps in (("in", inputs), ("out", outputs))
        for p in ps
    ]
    return (
        _table(("", "name", "dtype", "shape"), rows)
        + "Axes with a name may have any length, within the model's own limits.\n"
    )


def _metrics(report: ExportReport) -> str:
    saved = report.source.get("metrics") or {}
    lines = []
    if report.metrics.get("trained"):
        trained, exported = report.metrics["trained"], report.metrics["exported"]
        data = report.data or {}
        lines.append(f"On {_text(data.get('name'))} ({data.get('rows')} rows, digest `{data.get('digest')}`):\n")
        rows = [(n, _number(v), _number(exported.get(n))) for n, v in trained.items()]
        lines.append(_table(("metric", "trained model", "this export"), rows))
    if saved:
        lines.append("Noted when the checkpoint was saved:\n")
        lines.append(_table(("metric", "value"), [(n, _number(v)) for n, v in saved.items()]))
    return "\n".join(lines) or "None were measured.\n"


def _checks(found: Sequence[Check]) -> str:
    return _table(("", "question", "evidence"), [(_MARK[c.status], c.name, c.evidence) for c in found])


def _speeds(report: ExportReport) -> str:
    if not report.latency:
        return "Latency was not measured.\n"
    rows = [
        (one.model, one.shape, one.runs, f"{one.p50_ms:.2f}", f"{one.p95_ms:.2f}", f"{one.rows_per_s:.0f}",
         "unknown" if one.peak_bytes is None else size_text(one.peak_bytes))
        for one in report.latency
    ]  # fmt: skip
    return _table(("model", "batch", "calls", "p50 ms", "p95 ms", "rows/s", "peak memory above rest"), rows)


def _limits(report: ExportReport) -> list[str]:
    open_ = [f"{c.name}: {c.evidence}" for c in report.checks if c.status in ("warn", "skip")]
    return [*report.notes, *open_] or ["None known."]


def _mapping(values: Mapping[str, Any]) -> str:
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {_number(v)}" for k, v in value.items())
        rows.append((key, _number(value)))
    return _table(("", ""), rows)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "undefined" if value is None else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_text(cell) for cell in line)} |\n" for line in lines)


def _text(value: Any) -> str:
    """Return text that stays in its cell."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
