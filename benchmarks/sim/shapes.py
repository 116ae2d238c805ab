"""Shape-only training states: the models of MLPerf Storage's checkpointing table and a mixture of experts, in the
layouts that jobs use. No data; a rank's table is what ``distckpt.dcp`` would make of the real tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from distckpt.dcp.planner import Row
from distckpt.dcp.tables import Table
from distckpt.format.layout import Layout, Mesh, interned

OBJECTS = {"scheduler": "replicated", "epoch": "replicated", "optim.param_groups": "groups", "rng": "per_rank"}
KEPT = tuple((f"optim.state.{{}}.{kind}", "float32") for kind in ("master", "exp_avg", "exp_avg_sq"))
VOCABULARY = 128_256


def _flat(ranks: Sequence[int]) -> Mesh:
    return interned(Mesh.flat(ranks))


def _grid(shape: tuple[int, ...], ranks: tuple[int, ...]) -> Mesh:
    return interned(Mesh(shape, ranks))


@dataclass(frozen=True)
class Param:
    """A parameter. ``cut``: how tensor parallelism cuts it (``column`` rows, ``row`` columns, or not), ``layer`` -1 for
    embeddings and what follows the last layer; ``expert`` its number in a mixture of experts.
    """

    name: str
    shape: tuple[int, ...]
    cut: str = ""
    layer: int = -1
    expert: int = -1


@dataclass(frozen=True)
class Model:
    """A decoder. With ``experts`` every feed-forward part exists that many times, as tensors of their own."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv: int
    experts: int = 0

    def params(self) -> Iterator[Param]:
        """Yield every parameter."""
        h, narrow = self.hidden, self.hidden * self.kv // self.heads
        yield Param("tok_embeddings.weight", (VOCABULARY, h), "column")
        for layer in range(self.layers):
            at = f"layers.{layer}."
            for name, rows in (("wq", h), ("wk", narrow), ("wv", narrow)):
                yield Param(f"{at}attention.{name}.weight", (rows, h), "column", layer)
            yield Param(f"{at}attention.wo.weight", (h, h), "row", layer)
            for expert in range(self.experts) if self.experts else (-1,):
                where = f"{at}experts.{expert}." if self.experts else f"{at}feed_forward."
                yield Param(f"{where}w1.weight", (self.ffn, h), "column", layer, expert)
                yield Param(f"{where}w2.weight", (h, self.ffn), "row", layer, expert)
                yield Param(f"{where}w3.weight", (self.ffn, h), "column", layer, expert)
            yield Param(f"{at}attention_norm.weight", (h,), "", layer)
            yield Param(f"{at}ffn_norm.weight", (h,), "", layer)
        yield Param("norm.weight", (h,))
        yield Param("output.weight", (VOCABULARY, h), "column")


MODELS = {
    model.name: model
    for model in (
        Model("8B", 4096, 14336, 32, 32, 8),
        Model("70B", 8192, 28672, 80, 128, 8),
        Model("405B", 16384, 53248, 126, 128, 8),
        Model("1T", 25872, 98304, 128, 192, 32),
        Model("MoE", 7168, 2048, 20, 128, 128, experts=160),
    )
}


@dataclass(frozen=True)
class Job:
    """A state over a world: the distinct tables, and which ranks have each."""

    name: str
    world: int
    classes: tuple[tuple[Table, tuple[int, ...]], ...]

    def by_rank(self) -> list[Table]:
        """Return every rank's table; ranks of one class share one object."""
        tables: list[Table] = [self.classes[0][0]] * self.world
        for table, ranks in self.classes:
            for rank in ranks:
                tables[rank] = table
        return tables

    def table_of(self, rank: int) -> Table:
        """Return one rank's table."""
        return next(table for table, ranks in self.classes if rank in ranks)


def rows(params: Sequence[Param], layouts: Mapping[str, Layout]) -> dict[str, Row]:
    """Return a parameter's weight (bfloat16), master and moments (float32) in its layout, and its step, replicated."""
    out = {}
    for param in params:
        found = layouts[param.name]
        out[f"model.{param.name}"] = Row("bfloat16", param.shape, found)
        for name, dtype in KEPT:
            out[name.format(param.name)] = Row(dtype, param.shape, found)
        out[f"optim.state.{param.name}.step"] = Row("float32", (), None)
    return dict(sorted(out.items()))


def _one_class(name: str, world: int, params: Sequence[Param], layout: Callable[[Param], Layout]) -> Job:
    layouts = {param.name: layout(param) for param in params}
    return Job(name, world, ((Table(rows(params, layouts), {}, OBJECTS), tuple(range(world))),))


def fsdp(model: Model, world: int, most: int | None = None) -> Job:
    """FSDP2: every parameter in row shards over all ranks; ``most`` parameters at most."""
    over = Layout(_flat(range(world)), ("S(0)",))
    return _one_class("FSDP", world, list(model.params())[:most], lambda _: over)


def hsdp(model: Model, world: int, replicas: int = 8) -> Job:
    """Row shards over groups of ranks, each group a replica of the others."""
    over = Layout(_grid((replicas, world // replicas), tuple(range(world))), ("R", "S(0)"))
    return _one_class("HSDP", world, list(model.params()), lambda _: over)


def parallel(model: Model, world: int, tp: int = 8, pp: int = 64) -> Job:
    """Tensor, pipeline and data parallel (FSDP2): stages hold their own layers, each over a mesh (data, tensor)."""
    tp = min(tp, world)
    pp = min(pp, max(1, world // tp // 2))
    dp = world // tp // pp
    params = list(model.params())
    stages: list[list[Param]] = [[] for _ in range(pp)]
    for param in params:
        last = pp - 1 if param.name != "tok_embeddings.weight" else 0
        stages[param.layer * pp // model.layers if param.layer >= 0 else last].append(param)
    classes = []
    for stage, held in enumerate(stages):
        ranks = tuple(range(stage * dp * tp, (stage + 1) * dp * tp))
        mesh = _grid((dp, tp), ranks)
        ways = {
            "column": Layout(mesh, (f"SS(0,{tp})", "S(0)")),
            "row": Layout(mesh, ("S(0)", "S(1)")),
            "": Layout(mesh, ("S(0)", "R")),
        }
        classes.append((Table(rows(held, {p.name: ways[p.cut] for p in held}), {}, OBJECTS), ranks))
    return Job(f"TP{tp} PP{pp} DP{dp}", world, tuple(classes))


def expert_parallel(model: Model, world: int, ep: int = 64) -> Job:
    """Experts dealt out to ``ep`` groups, sharded within each; everything else sharded over all ranks."""
    ep = min(ep, world)
    everywhere = Layout(_flat(range(world)), ("S(0)",))
    params = list(model.params())
    classes = []
    for group in range(ep):
        ranks = tuple(range(group, world, ep))
        own = Layout(_flat(ranks), ("S(0)",))
        held = [p for p in params if p.expert < 0 or p.expert * ep // model.experts == group]
        ways = {p.name: own if p.expert >= 0 else everywhere for p in held}
        table = Table(rows(held, ways), {}, OBJECTS)
        classes.append((table, ranks))
    return Job(f"EP{ep}", world, tuple(classes))


def zero1(model: Model, world: int, pp: int = 64) -> Job:
    """ZeRO-1 within pipeline stages: each stage's parameters in one flat buffer, cut evenly over its ranks."""
    pp = min(pp, max(1, world // 2))
    dp = world // pp
    stages: list[list[Param]] = [[] for _ in range(pp)]
    for param in model.params():
        last = pp - 1 if param.name != "tok_embeddings.weight" else 0
        stages[param.layer * pp // model.layers if param.layer >= 0 else last].append(param)
    classes = []
    for stage, held in enumerate(stages):
        ranks = tuple(range(stage * dp, (stage + 1) * dp))
        mesh = _flat(ranks)
        partition = -(-sum(math.prod(p.shape) for p in held) // dp)
        offsets, at = {}, 0
        for param in held:
            offsets[param.name] = Layout(mesh, (f"F({at},{partition})",))
            at += math.prod(param.shape)
        found = rows(held, offsets)
        kept = {name: row for name, row in found.items() if not name.startswith("model.")}
        classes.append((Table(kept, {}, OBJECTS), ranks))
    return Job(f"ZeRO-1 PP{pp} DP{dp}", world, tuple(classes))


def zero3(model: Model, world: int) -> Job:
    """ZeRO-3: every parameter flattened and cut over all ranks."""
    mesh = _flat(range(world))

    def layout(param: Param) -> Layout:
        return Layout(mesh, (f"F(0,{-(-math.prod(param.shape) // world)})",))

    return _one_class("ZeRO-3", world, list(model.params()), layout)


def thousand(world: int, tensors: int = 1000) -> Job:
    """The measure's own state: as many sharded tensors for each rank, nothing else."""
    over = Layout(_flat(range(world)), ("S(0)",))
    held = {f"model.t{i:04}.weight": Row("bfloat16", (world, 4096), over) for i in range(tensors)}
    return Job(f"{tensors} tensors", world, ((Table(held, {}, OBJECTS), tuple(range(world))),))
