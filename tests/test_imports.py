"""Who may import whom: the core no optimizer, the kernels next to nothing, and nobody in a circle. Read from the sources."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "metaadamw_fast"
# What core/ may import of the rest of the package: ops and what they are made of.
OPS = {f"{PACKAGE}.{name}" for name in ("checks", "launch", "ops", "reference", "rounding")}
KERNELS_MAY = {f"{PACKAGE}.checks", f"{PACKAGE}.launch"}


def sources():
    """Each module's name with its file."""
    found = {}
    for folder, package in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = sources()


def statements(tree):
    """All statements but those under ``if TYPE_CHECKING``, which no run executes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield from (x for part in node.orelse for x in (part, *statements(part)))
        else:
            yield node
            yield from statements(node)


def imported(name, path=None, tree=None):
    """The modules that one imports, wherever in it; of this package the very submodules."""
    path = MODULES[name] if path is None else path
    tree = ast.parse(path.read_text()) if tree is None else tree
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in statements(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module)
    return found - {name}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(f"{PACKAGE}.core")])
def test_the_core_imports_no_optimizer_and_no_encoder(name):
    own = {x for x in imported(name) if x.split(".")[0] == PACKAGE}
    allowed = OPS | {x for x in MODULES if x.startswith(f"{PACKAGE}.core.")}
    assert own <= allowed | {f"{PACKAGE}.core"}, own - allowed


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(f"{PACKAGE}.core")])
def test_the_core_names_no_optimizer_but_in_words(name):
    words = {node.id for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.Attribute)}
    assert not words & {"MetaAdamW", "encoder", "GroupEncoder", "MetaLearner"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(f"{PACKAGE}.kernels")])
def test_kernels_import_little(name):
    outside = {
        x for x in imported(name) if not x.startswith(f"{PACKAGE}.kernels") and x.split(".")[0] not in sys.stdlib_module_names
    }
    others = {x for x in outside if x not in KERNELS_MAY and x.split(".")[0] not in ("torch", "triton")}
    assert not others


def test_no_module_imports_itself_through_others():
    graph = {name: {x for x in imported(name) if x in MODULES and x != PACKAGE} for name in MODULES if name != PACKAGE}
    done = set()
    while len(done) < len(graph):
        free = {
            name
            for name, others in graph.items()
            if name not in done and others <= done | {f"{PACKAGE}.core", f"{PACKAGE}.kernels"}
        }
        assert free, f"in a circle, or behind one: {sorted(graph.keys() - done)}"
        done |= free


def test_a_relative_import_is_seen():
    tree = ast.parse(
        "from ..checks import DTYPES\nfrom . import devices\nif TYPE_CHECKING:\n    from .optimizer import FusedOptimizer\n"
    )
    path = ROOT / PACKAGE / "core" / "watch.py"
    assert imported(f"{PACKAGE}.core.watch", path, tree) == {f"{PACKAGE}.checks", f"{PACKAGE}.core.devices"}
