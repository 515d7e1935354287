"""The shape of the project: imports go down, importing does nothing, configurations are valid."""

import ast
import graphlib
import pathlib
import pkgutil
import subprocess
import sys
import tomllib

import pytest

import e3jax
from e3jax import configure

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "e3jax"
FILES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

# A module imports from groups before its own; within a package also from its siblings.
ORDER = (
    {"errors"},
    {"devices", "files", "hopper", "mesh", "progress"},
    {"config", "processes"},
    {"configure", "ledger"},
    {"notice"},
    {"demo", "models"},
    {"hf", "data"},
    {"training"},
    {"distill"},
    {"search", "selectors"},
    {"job", "mask", "target"},
    {"evaluate", "planning", "teaching"},
    {"recovery"},
    {"refinement"},
    {"choice"},
    {"from_mask", "inspection", "outputs", "report"},
    {"rehearsal", "comparison", "bench"},
    {"plain", "sweep"},
    {"commands", "pipeline"},
    {"cli"},
    {"api"},
)
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {dotted(path): ast.parse(path.read_text()) for path in FILES}


def imports(nodes):
    """Full names that import statements among the nodes bring in, relative ones refused."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in TREES else node.module


def at_import(node):
    """Nodes that run when a module is imported: all outside of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import(child)


def upward(module, imported):
    """Whether a module of e3jax may not import another one."""
    if module == "e3jax":  # for type checkers; api.py is imported when it is asked for
        return False
    here, there = (name.split(".")[1] for name in (module, imported))
    return here != there and RANK[here] <= RANK[there]


INSIDE = {
    module: {name for name in imports(ast.walk(tree)) if name in TREES and name != "e3jax"}
    for module, tree in TREES.items()
}


def test_every_module_has_its_place():
    tops = {module.split(".")[1] for module in TREES if module != "e3jax"}
    assert tops == RANK.keys()


def test_imports_go_down():
    wrong = [f"{m} -> {name}" for m in INSIDE for name in INSIDE[m] if upward(m, name)]
    assert not wrong


def test_no_cycles():
    graphlib.TopologicalSorter(INSIDE).prepare()  # raises CycleError


def test_upward_is_told():
    assert upward("e3jax.models.decoder", "e3jax.hf.load")
    assert upward("e3jax.hf.load", "e3jax.data.text")  # neighbours do not know each other
    assert not upward("e3jax.hf.load", "e3jax.models.decoder")
    assert not upward("e3jax.hf.load", "e3jax.hf.families")


FORBIDDEN = {
    # Weights and data come from others: nothing of theirs may be run.
    "import pickle": "pickle",
    "from cloudpickle import loads": "cloudpickle",
    "np.load(path, allow_pickle=True)": "allow_pickle",
    "f(trust_remote_code=flag)": "trust_remote_code",
    "eval(text)": "eval",
    # Optional: a function that needs it imports it.
    "import torch": "torch",
    "if True:\n    from torch import nn": "torch",
}


def forbidden(tree):
    """What a module may not use."""
    anywhere = {name.split(".")[0] for name in imports(ast.walk(tree))}
    found = anywhere & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    found |= {name.split(".")[0] for name in imports(at_import(tree))} & {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.add(node.arg)
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec"):
            found.add(node.id)
    return found


def test_nothing_forbidden():
    assert {module: found for module in TREES if (found := forbidden(TREES[module]))} == {}


@pytest.mark.parametrize(("source", "name"), FORBIDDEN.items())
def test_forbidden_is_found(source, name):
    assert forbidden(ast.parse(source)) == {name}
    assert forbidden(ast.parse("def f():\n    import torch")) == set()


PLACES = {"PartitionSpec", "NamedSharding", "AxisType", "P", "axis_name", "axis_names"}


def places(tree):
    """Where a module says itself how an array is laid out, or which axes a mesh has."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax"):
            yield from {alias.name for alias in node.names} & PLACES
        elif isinstance(node, ast.Attribute) and node.attr in PLACES:
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg in PLACES:
            yield node.arg


def test_only_the_mesh_names_its_axes():
    """One table of partition specs: all others name logical axes."""
    found = {module: set(places(tree)) for module, tree in TREES.items()}
    assert found.pop("e3jax.mesh") >= {"PartitionSpec", "NamedSharding", "AxisType"}
    assert {module: names for module, names in found.items() if names} == {}
    for source in (
        "from jax.sharding import PartitionSpec as P",
        "x = jax.P('model')",
        "jax.sharding.NamedSharding(mesh, spec)",
        "jax.shard_map(f, axis_names={'data'})",
    ):
        assert set(places(ast.parse(source)))


def test_files_are_short():
    lines = {dotted(path): len(path.read_text().splitlines()) for path in FILES}
    assert {module: n for module, n in lines.items() if n > 400} == {}
    assert not [module for module in lines if module.endswith("utils")]


def test_importing_has_no_side_effects(tmp_path):
    """Every module imported in a fresh process: no variable, file, device, setting, or torch."""
    names = [m.name for m in pkgutil.walk_packages(e3jax.__path__, "e3jax.")]
    assert len(names) > 30
    program = f"""
import importlib, logging, os, sys
# What other libraries do when imported is theirs.
import flax, grain, jax, matplotlib.figure, numpy, optax, orbax.checkpoint, transformers
import jax.experimental.pallas.mosaic_gpu
before, here = dict(os.environ), os.listdir()
settings, handlers = dict(jax.config.values), list(logging.getLogger().handlers)
for name in {names!r}:
    importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a device was asked for"
assert dict(os.environ) == before, "an environment variable was set"
assert os.listdir() == here, "a file was written"
assert dict(jax.config.values) == settings, "jax.config was changed"
assert logging.getLogger().handlers == handlers, "logging was set up"
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_are_valid(path):
    run = configure.load_run(path)
    assert run.out == f"runs/{path.stem}"
    assert run.data.train and run.data.held_out
    assert all(".." not in source.path and source.path[0] not in "/~" for source in run.data.train)


def test_configurations_keep_what_they_say():
    keep = {path.stem: configure.load_run(path).search.keep for path in CONFIGS}
    del keep["demo-train"], keep["second-train"]
    assert keep == {
        "deepseek-r1": 46,
        "demo": 12,
        "chain-math": 18,
        "second": 24,
        "qwen3-32b-math": 48,
        "llama2-7b": 12,
        "qwen2.5-14b": 24,
    }


def test_demo_model_is_a_valid_architecture():
    from e3jax.hf.families import read_config
    from e3jax.models.decoder import count_params

    cfg = read_config(ROOT / "configs" / "demo-model.json")
    assert cfg.num_layers == 16 and 2e6 < count_params(cfg) < 4e6  # 8 MB in bfloat16


def test_wheel_holds_every_package_and_the_demo():
    """Setuptools' list is written out, since configs/ lies elsewhere: it must be complete."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {dotted(path.parent / "__init__.py") for path in FILES}
    assert set(settings["packages"]) == folders | {"e3jax.configs"}
    for package, patterns in settings["package-data"].items():
        folder = ROOT / settings["package-dir"].get(package, package.replace(".", "/"))
        shipped = {path for pattern in patterns for path in folder.glob(pattern)}
        files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
        present = {p for p in files if p.suffix not in (".py", ".pyc")}
        assert shipped == present
