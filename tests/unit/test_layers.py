"""The shape of the code, from its syntax trees: who may import whom, and what has only one home."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "distckpt"
LAYERS = (
    "errors", "clock", "failpoints", "heap", "config", "boxes", "storage", "format", "dcp", "engines", "manager",
    "selection", "export", "importers", "averaging", "analysis", "integrations", "cli",
)  # fmt: skip
LATER = {"export/inference.py": "averaging"}
"""Modules that count as a later layer than their folder: this one opens what ``importers`` read, and only ``cli`` calls it."""
MAX_LINES = 400
HEAVY = {"torch", "numpy", "safetensors", "typer", "rich", "hypothesis", "obstore"}
LATE_TORCH = {"format/box_columns.py", "format/box_reader.py", "format/checkpoint.py", "format/typed_arrays.py"}
"""Left of ``dcp`` only these may import torch or NumPy, inside functions: where a tensor's bytes become one."""


@dataclass(frozen=True)
class Import:
    """One imported module, where it stands, and whether it runs when the file is imported."""

    file: str
    line: int
    module: str
    names: tuple[str, ...]
    at_top: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.module}"


def parsed(root: Path) -> dict[str, ast.Module]:
    """Return the tree of every file of a package, by its path below the package."""
    return {
        path.relative_to(root).as_posix(): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path in sorted(root.rglob("*.py"))
    }


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(file: str, tree: ast.AST, *, at_top: bool = True) -> Iterator[Import]:
    """Yield every import that can run; those for type checkers alone are left out."""
    for node in ast.iter_child_nodes(tree):
        if is_typing_only(node):
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, (), at_top)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield Import(file, node.lineno, "." * node.level + (node.module or ""), names, at_top)
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports_of(file, node, at_top=at_top and not inside)


def all_imports(trees: dict[str, ast.Module]) -> list[Import]:
    return [found for file, tree in trees.items() for found in imports_of(file, tree)]


def layer_of(file: str) -> str | None:
    """Return a file's layer; None for the package's own ``__init__.py``, which resolves names lazily."""
    if file in LATER:
        return LATER[file]
    first = file.split("/")[0].removesuffix(".py")
    return None if first == "__init__" else first


def imported_layers(found: Import) -> list[str]:
    """Return the layers that an import reaches: ``from distckpt import clock`` reaches ``clock``."""
    parts = found.module.split(".")
    if parts[0] != "distckpt":
        return []
    later = LATER.get("/".join(parts[1:]) + ".py")
    if later is not None:
        return [later]
    if len(parts) > 1:
        return [parts[1]]
    return [name for name in found.names if name != "__version__"]


def wrong_direction(found: Import) -> bool:
    here = layer_of(found.file)
    if found.module.startswith("."):
        return True
    if here is None:
        return bool(imported_layers(found))
    return any(LAYERS.index(layer) > LAYERS.index(here) for layer in imported_layers(found))


def too_heavy(found: Import) -> bool:
    """Left of ``dcp``: nothing slow at import time, torch and NumPy late and only where tensors are made."""
    here, top = layer_of(found.file), found.module.split(".")[0]
    if top == "obstore":
        return found.at_top or not found.file.startswith("storage/objects")
    if top in ("typer", "rich"):
        return here != "cli" and not (top == "rich" and found.file == "manager/display.py" and not found.at_top)
    if top not in HEAVY or (here is not None and LAYERS.index(here) >= LAYERS.index("dcp") and here != "cli"):
        return False
    return found.at_top or here == "cli" or found.file not in LATE_TORCH


TREES = parsed(PACKAGE)
IMPORTS = all_imports(TREES)
CHECKS: dict[str, Callable[[Import], bool]] = {"direction": wrong_direction, "weight": too_heavy}


def test_every_file_belongs_to_a_layer() -> None:
    assert {layer for file in TREES if (layer := layer_of(file)) is not None} <= set(LAYERS)
    assert len(TREES) > 50


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_imports(check: Callable[[Import], bool]) -> None:
    assert [str(found) for found in IMPORTS if check(found)] == []


def test_nothing_can_unpickle() -> None:
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    # A child process of `distckpt convert` reads foreign pickles, with stand-ins alone; `torch.save` files are written.
    child, writer = "importers/restricted_unpickler.py", "export/torch_file.py"
    users = [found for found in IMPORTS if found.module.split(".")[0] in banned]
    assert [str(found) for found in users if found.file not in (child, writer)] == []
    names = {ast.unparse(n) for n in ast.walk(TREES[writer]) if isinstance(n, ast.Attribute)}
    assert {name for name in names if name.startswith("pickle.")} == {"pickle.Pickler"}
    assert [str(found) for found in IMPORTS if "restricted_unpickler" in (*found.module.split("."), *found.names)] == []
    read = [f"{f}:{n.lineno}" for f, n, name in calls() if name in ("torch.load", "np.load", "numpy.load")]
    assert read == []
    # DCP's planners take objects as torch.save bytes only: made and read in memory, never on storage.
    saved = [f for f, _, name in calls() if name in ("torch.save", "np.save", "numpy.save")]
    assert set(saved) <= {"dcp/plugin.py"}


def test_only_clock_reads_time() -> None:
    found = [str(i) for i in IMPORTS if i.module.split(".")[0] == "time" and i.file != "clock.py"]
    now = (
        "datetime.now",
        "datetime.utcnow",
        "datetime.today",
        "date.today",
        "time.time",
        "time.monotonic",
        "time.sleep",
    )
    reads = [f"{f}:{n.lineno}: {name}" for f, n, name in calls() if name.endswith(now) and f not in ("clock.py",)]
    reads = [read for read in reads if not read.endswith(("clock.monotonic", "clock.sleep"))]
    assert found + reads == []


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield file, node, ast.unparse(node.func)


def test_only_the_command_line_prints() -> None:
    assert [f"{f}:{n.lineno}" for f, n, name in calls() if name == "print" and layer_of(f) != "cli"] == []


def test_no_except_without_a_type() -> None:
    bare = [
        f"{file}:{node.lineno}"
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert bare == []


def test_files_stay_short() -> None:
    lengths = {file: len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in TREES}
    assert {file: length for file, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize(
    ("what", "homes"),
    [
        # The commit point is a hard link; only the POSIX store, and what publishes exports, may touch links and renames.
        (("os.link", "os.rename", "os.renames", "os.replace", "os.symlink"), ("storage/", "export/stream.py")),
        (("os.fsync", "os.fdatasync", "os.unlink", "os.remove", "os.rmdir"), ("storage/", "export/stream.py")),
        (("shutil.rmtree", "os.removedirs"), ()),
        # One door for writing a manifest, one for sending it to peers.
        (("encode_manifest",), ("format/commit.py", "format/manifest.py", "manager/exchange.py")),
        (("create_generation",), ("manager/line.py", "dcp/plugin.py", "importers/commit_source.py")),
        (("os.fork", "os.system"), ()),
        (("eval", "exec", "__import__"), ()),
    ],
    ids=lambda value: value[0] if value and isinstance(value, tuple) else "nowhere",
)
def test_one_home(what: tuple[str, ...], homes: tuple[str, ...]) -> None:
    found = [f"{f}:{n.lineno}: {name}" for f, n, name in calls() if name in what and not f.startswith(homes or "\0")]
    assert found == []


def methods_called(*wanted: str, on: str = "store") -> list[str]:
    """Return where a method of a store (``store``, ``self.store``, ``sweep.store``) is called."""
    return [
        f"{file}:{node.lineno}"
        for file, node, name in calls()
        if name.rpartition(".")[2] in wanted and name.rpartition(".")[0].rpartition(".")[2] in (on, f"_{on}")
    ]


def test_checkpoints_are_deleted_by_the_collector_alone() -> None:
    # Besides: the pin, the control file, and the probe of the store's clock are no part of a checkpoint.
    allowed = ("manager/gc.py", "manager/root.py", "format/lineage.py", "format/doctor.py", "storage/", "dcp/rounds.py")
    deletes = [at for at in methods_called("delete", "remove_folder") if not at.startswith(allowed)]
    assert deletes == []


def test_files_are_created_where_they_belong() -> None:
    allowed = ("format/commit.py", "format/lineage.py", "format/doctor.py", "manager/root.py", "selection/cache.py")
    allowed += ("analysis/norms.py", "storage/probes.py")  # the latter on a scratch root
    assert [at for at in methods_called("create") if not at.startswith(allowed)] == []
    writers = ("dcp/writer.py", "importers/stream_shard.py", "storage/probes.py")
    assert [at for at in methods_called("open_writer") if not at.startswith(writers)] == []
    assert [at for at in methods_called("replace") if not at.startswith(allowed)] == []


def test_only_the_agreement_waits_for_peers() -> None:
    collective = ("barrier", "all_reduce", "all_gather", "all_gather_object", "broadcast_object_list", "gather_object",
                  "scatter_object_list", "monitored_barrier", "reduce", "broadcast")  # fmt: skip
    found = [
        f"{file}:{node.lineno}: {name}"
        for file, node, name in calls()
        if name.rpartition(".")[2] in collective and name.rpartition(".")[0] in ("dist", "torch.distributed")
    ]
    # Live replicas are reduced over the training's own groups, each wait with the call's deadline, in one place.
    assert [at for at in found if not at.startswith("averaging/buckets.py")] == []
    assert len(found) == 2
    # A full save moves tensors between ranks, point to point, and is the one place that does.
    moved = [f for f, _, name in calls() if name in ("dist.send", "dist.recv", "dist.isend", "dist.irecv")]
    assert set(moved) <= {"dcp/full.py"}


# ---------------------------------------------------------------- the checks themselves can fail


def found_in(file: str, source: str) -> list[Import]:
    return list(imports_of(file, ast.parse(source)))


@pytest.mark.parametrize(
    ("file", "source", "check", "wrong"),
    [
        ("format/commit.py", "from distckpt.manager.gc import collect", wrong_direction, True),
        ("format/commit.py", "def f():\n    from distckpt.dcp import writer", wrong_direction, True),
        ("format/commit.py", "from distckpt import clock, failpoints", wrong_direction, False),
        ("boxes.py", "from distckpt import format", wrong_direction, True),
        ("importers/convert.py", "from distckpt.export.inference import x", wrong_direction, True),
        ("export/proof.py", "from distckpt.importers.convert import x", wrong_direction, True),
        ("cli/ls.py", "from distckpt.manager.root import RunRoot", wrong_direction, False),
        ("dcp/reader.py", "from .writer import x", wrong_direction, True),
        ("format/shard.py", "if TYPE_CHECKING:\n    from distckpt.cli import x", wrong_direction, False),
        ("format/shard.py", "import numpy as np", too_heavy, True),
        ("format/shard.py", "def f():\n    import torch", too_heavy, True),
        ("format/box_reader.py", "def f():\n    import numpy as np", too_heavy, False),
        ("format/box_reader.py", "try:\n    import numpy as np\nexcept ImportError:\n    pass", too_heavy, True),
        ("dcp/reader.py", "import torch", too_heavy, False),
        ("manager/manager.py", "import rich", too_heavy, True),
        ("manager/display.py", "def f():\n    from rich.table import Table", too_heavy, False),
        ("manager/display.py", "from rich.table import Table", too_heavy, True),
        ("cli/ls.py", "import rich.table", too_heavy, False),
        ("cli/ls.py", "import torch", too_heavy, True),
        ("storage/objects_bucket.py", "def f():\n    import obstore", too_heavy, False),
        ("storage/objects_bucket.py", "from obstore.store import S3Store", too_heavy, True),
        ("dcp/writer.py", "def f():\n    import obstore", too_heavy, True),
    ],
)
def test_the_rules_catch_what_they_are_for(
    file: str, source: str, check: Callable[[Import], bool], wrong: bool
) -> None:
    assert any(map(check, found_in(file, source))) is wrong
