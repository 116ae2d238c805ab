"""``distckpt show``: one checkpoint: where it comes from and what is in it. Reads its manifest only."""

from __future__ import annotations

import json as json_text
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import msgspec
import typer

from distckpt.boxes import Box
from distckpt.cli import options
from distckpt.cli.output import Column, clean, print_json, print_table, readable, size_text, time_text, value_text
from distckpt.cli.places import path_of, place
from distckpt.format.catalog import is_pinned
from distckpt.format.checkpoint import Checkpoint, open_checkpoint
from distckpt.format.doctor import reference_text
from distckpt.format.dtypes import itemsize
from distckpt.format.lineage import Generation, lineage, list_committed, read_generations
from distckpt.format.manifest import Manifest, TensorEntry, layout_text

_LONGEST = 100


def show(
    path: options.Where,
    step: options.Step = None,
    tensors: bool = typer.Option(False, "--tensors", "-t", help="Every tensor: dtype, shape, layout, bytes."),
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show one checkpoint (of a root the newest whole one): facts, metrics, tensors, objects, where it comes from."""
    at = place(path, step)
    checkpoint = open_checkpoint(path_of(at))
    if json:
        print_json(_document(checkpoint, tensors))
        return
    _print_facts(checkpoint)
    _print_metrics(checkpoint)
    _print_groups(checkpoint.manifest)
    if tensors:
        _print_tensors(checkpoint.manifest)
    _print_objects(checkpoint.manifest)
    _print_lineage(checkpoint)


# ---------------------------------------------------------------- what the manifest says


def nbytes_of(entry: TensorEntry) -> int:
    """Return the bytes of a whole tensor."""
    return Box.whole(tuple(entry.shape)).numel * itemsize(entry.dtype)


def groups(manifest: Manifest) -> list[tuple[str, int, int, list[str]]]:
    """Return (first part of the names, tensors, bytes, dtypes) of each group of tensors."""
    found: dict[str, list[TensorEntry]] = defaultdict(list)
    for fqn, entry in manifest.tensors.items():
        found[fqn.partition(".")[0]].append(entry)
    return [(name, len(e), sum(map(nbytes_of, e)), sorted({t.dtype for t in e})) for name, e in sorted(found.items())]


def _descent(checkpoint: Checkpoint) -> list[Generation]:
    """Return the job starts from the one that wrote it back to the first, as far as their records are there."""
    records = {record.number: record for record in read_generations(checkpoint.store)}
    line = []
    record = records.get(checkpoint.generation)
    while record is not None:
        line.append(record)
        source = record.resumed_from
        record = records.get(source[0]) if source is not None and source[0] < record.number else None
    return line


def _stray(checkpoint: Checkpoint) -> bool:
    store = checkpoint.store
    return checkpoint.committed not in lineage(list_committed(store), read_generations(store))


def _document(checkpoint: Checkpoint, tensors: bool) -> dict[str, Any]:
    m = checkpoint.manifest
    listed = {
        fqn: {"dtype": e.dtype, "shape": e.shape, "layout": layout_text(m, e), "nbytes": nbytes_of(e)}
        for fqn, e in m.tensors.items()
    }
    return {
        "path": checkpoint.path, "manifest": checkpoint.committed.manifest_path, "step": m.step, "epoch": m.epoch,
        "time": m.time, "generation": m.generation, "attempt": m.attempt, "save_id": m.save_id,
        "world_size": m.world_size, "engine": m.engine, "version": m.version, "software": m.software,
        "pinned": is_pinned(checkpoint.store, checkpoint.committed), "stray": _stray(checkpoint),
        "metrics": checkpoint.metrics, "nbytes": sum(shard.size for shard in m.shards), "shards": len(m.shards),
        "references": [msgspec.to_builtins(reference) for reference in m.references],
        "tensors": listed if tensors else len(m.tensors), "aliases": m.aliases,
        "groups": [dict(zip(("name", "tensors", "nbytes", "dtypes"), group, strict=True)) for group in groups(m)],
        "objects": m.objects, "per_rank": m.per_rank, "config": m.config, "provenance": m.provenance,
        "lineage": _descent(checkpoint),
    }  # fmt: skip


# ---------------------------------------------------------------- text


def _print_facts(checkpoint: Checkpoint) -> None:
    m = checkpoint.manifest
    pinned = is_pinned(checkpoint.store, checkpoint.committed)
    marks = [word for word, holds in (("pinned", pinned), ("stray: never resumed from", _stray(checkpoint))) if holds]
    rows = [
        ["path", getattr(checkpoint.store, "root", checkpoint.store.url) + "/" + checkpoint.committed.folder],
        ["step", f"{m.step}"],
        ["epoch", "" if m.epoch is None else value_text(m.epoch)],
        ["time (UTC)", time_text(m.time)],
        ["size", f"{size_text(sum(shard.size for shard in m.shards))} in {_count(len(m.shards), 'shard')}"],
        ["refers to", reference_text(m).partition(", ")[2] if m.references else ""],
        ["saved by", f"{_count(m.world_size, 'rank')}, engine {m.engine}, generation {m.generation}"],
        ["attempt", m.attempt],
        ["save id", m.save_id],
        ["format", ".".join(map(str, m.version))],
        ["software", ", ".join(f"{name} {version}" for name, version in sorted(m.software.items()))],
        ["config", "" if m.config is None else _short(m.config)],
        ["marks", ", ".join(marks)],
    ]
    print_table([Column(""), Column("", fold=True)], [[name, clean(value)] for name, value in rows if value])


def _print_metrics(checkpoint: Checkpoint) -> None:
    if checkpoint.metrics:
        rows = [[clean(name), value_text(value)] for name, value in checkpoint.metrics.items()]
        _section([Column("metric", fold=True), Column("value", right=True)], rows)


def _print_groups(m: Manifest) -> None:
    rows = [[f"{clean(name)}.*", str(n), size_text(size), " ".join(kinds)] for name, n, size, kinds in groups(m)]
    total = sum(map(nbytes_of, m.tensors.values()))
    rows.append(["all", str(len(m.tensors)), size_text(total), _count(len(m.aliases), "alias", "es") * bool(m.aliases)])
    columns = [
        Column("tensors"),
        Column("number", right=True),
        Column("bytes", right=True),
        Column("dtypes", fold=True),
    ]
    _section(columns, rows)


def _print_tensors(m: Manifest) -> None:
    rows = [
        [clean(fqn), e.dtype, "x".join(map(str, e.shape)) or "scalar", layout_text(m, e), str(nbytes_of(e))]
        for fqn, e in m.tensors.items()
    ]
    rows += [[clean(alias), "", "", f"the same as {clean(target)}", ""] for alias, target in m.aliases.items()]
    columns = [
        Column("tensor", fold=True),
        Column("dtype"),
        Column("shape"),
        Column("layout", fold=True),
        Column("bytes", right=True),
    ]
    _section(columns, rows)


def _print_objects(m: Manifest) -> None:
    rows = [[clean(name), _short(value)] for name, value in sorted(m.objects.items())]
    rows += [[clean(name), "in every rank's shard, its own"] for name in m.per_rank]
    if rows:
        _section([Column("object"), Column("content", fold=True)], rows)


def _print_lineage(checkpoint: Checkpoint) -> None:
    rows = []
    for record in _descent(checkpoint):
        source = record.resumed_from
        what = "a fresh start" if source is None else f"step {source[1]} of generation {source[0]}"
        rows.append([str(record.number), time_text(record.time), record.host, record.owner, what])
    if rows:
        columns = [
            Column("gen", right=True),
            Column("started (UTC)"),
            Column("host", fold=True),
            Column("owner", fold=True),
            Column("from", fold=True),
        ]
        _section(columns, [[clean(cell) for cell in row] for row in rows])
    provenance = readable(checkpoint.manifest.provenance)
    if isinstance(provenance, dict):
        rows = [[clean(name), _short(value)] for name, value in provenance.items() if value is not None]
        if rows:
            _section([Column("provenance"), Column("", fold=True)], rows)


def _section(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    print()
    print_table(columns, rows)


def _short(value: Any) -> str:
    text = _json(readable(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def _json(value: Any) -> str:
    return clean(json_text.dumps(value, ensure_ascii=False))


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{plural * (number != 1)}"
