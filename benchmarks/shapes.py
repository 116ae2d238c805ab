"""What is saved and loaded: the tensors of each workload by name, shape, dtype and placement. No torch, no bytes.

Models keep the tensor counts of their originals (MLPerf Storage v2.0, checkpointing: hidden, FFN, layers, heads, KV
heads of Llama-3.1-like models; Qwen3-30B-A3B for the many small ones) and have their widths scaled, so that planning
and per-tensor costs are those of the original while bytes fit a small machine. Optimizer state is that of mixed
precision Adam: a bf16 weight, fp32 master, exp_avg and exp_avg_sq, 14 bytes a parameter.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

ITEMSIZE = {"bfloat16": 2, "float32": 4}
STATES = ("master", "exp_avg", "exp_avg_sq")

ROWS, COLUMNS, REPLICATED, FLAT = "rows", "columns", "replicated", "flat"
"""Placements over the ranks: cut along dimension 0 or 1 as ``torch.chunk`` cuts, whole on every rank, or a contiguous
part of one flat buffer per kind of state (ZeRO), which cuts tensors anywhere and is padded."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One global tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Workload:
    """A state: its tensors, and how they lie over the ranks."""

    name: str
    title: str
    tensors: tuple[TensorSpec, ...]
    placement: str = ROWS

    @property
    def nbytes(self) -> int:
        """Unique bytes of the state."""
        return sum(spec.nbytes for spec in self.tensors)

    def placed(self, placement: str) -> Workload:
        """Return the same state in another layout."""
        return replace(self, placement=placement)


# ---------------------------------------------------------------------- models

Shapes = list[tuple[str, tuple[int, ...]]]


def transformer(layers: int, hidden: int, ffn: int, kv: int, vocab: int) -> Shapes:
    """Return the parameters of a Llama: 9 a layer and 3 more; ``kv`` is the width of keys and of values."""
    out: Shapes = [("embed_tokens.weight", (vocab, hidden))]
    for n in range(layers):
        at = f"layers.{n}"
        out += [(f"{at}.self_attn.{p}_proj.weight", (w, hidden)) for p, w in (("q", hidden), ("k", kv), ("v", kv))]
        out += [
            (f"{at}.self_attn.o_proj.weight", (hidden, hidden)),
            (f"{at}.mlp.gate_proj.weight", (ffn, hidden)),
            (f"{at}.mlp.up_proj.weight", (ffn, hidden)),
            (f"{at}.mlp.down_proj.weight", (hidden, ffn)),
            (f"{at}.input_layernorm.weight", (hidden,)),
            (f"{at}.post_attention_layernorm.weight", (hidden,)),
        ]
    return [*out, ("norm.weight", (hidden,)), ("lm_head.weight", (vocab, hidden))]


def mixture(layers: int, experts: int, hidden: int, ffn: int, vocab: int) -> Shapes:
    """Return the parameters of a mixture of experts: 9 + 3 x ``experts`` a layer and 3 more."""
    out: Shapes = [("embed_tokens.weight", (vocab, hidden))]
    for n in range(layers):
        at = f"layers.{n}"
        out += [(f"{at}.self_attn.{p}_proj.weight", (w, hidden)) for p, w in (("q", hidden), ("k", 64), ("v", 64))]
        out += [(f"{at}.self_attn.o_proj.weight", (hidden, hidden))]
        out += [(f"{at}.self_attn.{p}_norm.weight", (64,)) for p in "qk"]
        out += [(f"{at}.{p}_layernorm.weight", (hidden,)) for p in ("input", "post_attention")]
        out += [(f"{at}.mlp.gate.weight", (experts, hidden))]
        for e in range(experts):
            out += [(f"{at}.mlp.experts.{e}.{p}_proj.weight", (ffn, hidden)) for p in ("gate", "up")]
            out += [(f"{at}.mlp.experts.{e}.down_proj.weight", (hidden, ffn))]
    return [*out, ("norm.weight", (hidden,)), ("lm_head.weight", (vocab, hidden))]


def trained(shapes: Shapes) -> Iterator[TensorSpec]:
    """Yield each parameter and its three optimizer tensors."""
    for name, shape in shapes:
        yield TensorSpec(f"weights.{name}", shape)
        for state in STATES:
            yield TensorSpec(f"optim.{name}.{state}", shape, "float32")


def scaled(build: Callable[[int], Sequence[TensorSpec]], nbytes: int, *, step: int = 16) -> tuple[TensorSpec, ...]:
    """Return ``build(width)`` of the multiple of ``step`` whose bytes come closest to ``nbytes``; at least one step."""

    def size(steps: int) -> int:
        return sum(spec.nbytes for spec in build(steps * step))

    high = 1
    while size(high) < nbytes:
        high *= 2
    above = bisect_left(range(high + 1), nbytes, lo=1, key=size)
    nearest = min((max(1, above - 1), above), key=lambda steps: abs(size(steps) - nbytes))
    return tuple(build(nearest * step))


# ---------------------------------------------------------------------- workloads

LLAMAS = {"llama8b": 32, "llama70b": 80, "llama405b": 126, "llama1t": 128}
"""Layers. Tensors: 4 x (9 x layers + 3)."""


def llama(name: str, nbytes: int, placement: str = ROWS) -> Workload:
    """A dense model with its optimizer state. FFN is 3.5 times the width, keys and values a quarter (8B)."""
    layers = LLAMAS[name]

    def build(width: int) -> list[TensorSpec]:
        ffn, kv, vocab = width * 7 // 2, max(4, width // 4), width * 32
        return list(trained(transformer(layers, width, ffn, kv, vocab)))

    return Workload(name, f"{name} with its optimizer, widths scaled", scaled(build, nbytes), placement)


def small(nbytes: int) -> Workload:
    """18,867 tensors: the weights of Qwen3-30B-A3B (48 layers, 128 experts), each expert matrix about 100 KB at 1.9 GB."""

    def build(width: int) -> list[TensorSpec]:
        return [TensorSpec(f"weights.{n}", s) for n, s in mixture(48, 128, width, width * 3 // 4, 64 * width)]

    return Workload("small", "18,867 small tensors", scaled(build, nbytes, step=8))


def one_big(nbytes: int) -> Workload:
    """Four tensors of equal size: bandwidth and nothing else."""
    rows = max(1, round(nbytes / 4 / 2 / 4096))
    specs = tuple(TensorSpec(f"weights.block.{i}", (rows, 4096)) for i in range(4))
    return Workload("one-big", "four large tensors", specs)


def lora(nbytes: int, rank: int = 2) -> Workload:
    """A frozen bf16 model with low-rank adapters and their optimizer state; ``CHANGING`` names what training changes."""

    def build(width: int) -> list[TensorSpec]:
        base = transformer(32, width, width * 7 // 2, max(4, width // 4), width * 32)
        adapters: Shapes = []
        for name, shape in base:
            if "_proj" in name and "attn" in name and ".q_" in name:
                at = name.removesuffix(".weight")
                adapters += [(f"{at}.lora_A.weight", (rank, shape[1])), (f"{at}.lora_B.weight", (shape[0], rank))]
        return [TensorSpec(f"weights.{n}", s) for n, s in base] + list(trained(adapters))

    return Workload("lora", "frozen model with adapters", scaled(build, nbytes))


CHANGING = "lora_"


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    **{name: partial(llama, name) for name in LLAMAS},
    "small": small,
    "one-big": one_big,
    "lora": lora,
    "replicated": lambda nbytes: replace(
        llama("llama8b", nbytes, REPLICATED), name="replicated", title="llama8b, whole on every rank (DDP, HSDP)"
    ),
    "zero-flat": lambda nbytes: replace(
        llama("llama8b", nbytes, FLAT), name="zero-flat", title="llama8b as flat partitions (ZeRO)"
    ),
}


@lru_cache(maxsize=8)
def make_workload(name: str, nbytes: int) -> Workload:
    """Return a workload at about this many bytes; ``KeyError`` for a name that is not in ``WORKLOADS``."""
    return WORKLOADS[name](nbytes)
