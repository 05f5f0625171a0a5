"""The rings of the code, read from its syntax trees: who may import whom, and what stands nowhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.domain.recipe import CHILDREN
from tests.conftest import ROOT

# What each part may import of this project (first match; a module may always import its own part).
RINGS: dict[str, tuple[str, ...]] = {
    "tasks.domain": (),
    "tasks.algorithms": ("tasks.domain",),
    "tasks.store": ("tasks.algorithms", "tasks.domain"),
    "tasks.engines": ("tasks.algorithms", "tasks.domain"),
    "tasks": ("tasks.store", "tasks.engines", "tasks.algorithms", "tasks.domain"),
    "flows": ("tasks", "deployments"),
    "deployments": ("tasks.domain",),
}
# Where heavy libraries may be imported, at the top of a file or inside a function.
HEAVY: dict[str, tuple[str, ...]] = {
    "torch": ("tasks.algorithms", "tasks.engines"),
    **dict.fromkeys(("vllm", "peft", "lm_eval", "transformers"), ("tasks.engines.children",)),
    "prefect": ("tasks", "flows", "deployments"),
    **dict.fromkeys(("ray", "prefect_ray"), ("tasks.placement",)),
}
PURE = ("tasks.domain", "tasks.algorithms")
NOT_PURE = {"prefect", "fsspec", "s3fs", "subprocess", "socket", "urllib", "requests", "huggingface_hub", "datasets"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


def sources() -> list[Path]:
    return sorted(path for folder in ("flows", "tasks", "deployments") for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    return next(part for part in RINGS if module == part or module.startswith(f"{part}."))


def within(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported, also inside functions and by `importlib`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [base])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            (name, *_) = node.args
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def outward_imports(source: str, module: str) -> list[str]:
    """Imports that leave the rings."""
    own = part_of(module)
    faults = []
    for line, name in imports(ast.parse(source), module):
        top = name.split(".")[0]
        if top == "tests":
            faults.append(f"{line}: {name}")
        if top in ("tasks", "flows", "deployments") and name != "tasks":
            target = part_of(name)
            allowed = target == own or target in RINGS[own] or (target == "tasks" and "tasks" in RINGS[own])
            if not (allowed or (own == "flows" and top == "tasks")):
                faults.append(f"{line}: {name}")
    return faults


def heavy_imports(source: str, module: str) -> list[str]:
    faults = []
    for line, name in imports(ast.parse(source), module):
        top = name.split(".")[0]
        if top in HEAVY and not any(within(module, part) for part in HEAVY[top]):
            faults.append(f"{line}: {name}")
        if top in NOT_PURE and any(within(module, part) for part in PURE):
            faults.append(f"{line}: {name}")
    return faults


def unsafe_code(source: str) -> list[str]:
    """Whatever runs code that came with data."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            faults += [name for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS or name == "torch.load"]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "yaml.load", "yaml.unsafe_load"):
            faults.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call):
            faults += [f"{node.lineno}: {word.arg}" for word in node.keywords if word.arg == "trust_remote_code"]
            faults += [f"{node.lineno}: {word.arg}=" for word in node.keywords if word.arg == "shell"]
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                faults.append(f"{node.lineno}: {node.func.id}")
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            faults.append(f"{node.lineno}: {node.value}")
    return faults


def untyped_functions(source: str) -> list[str]:
    """Functions without a return annotation, or with an argument without one."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            ]
            bare = [a.arg for a in arguments if a and a.annotation is None and a.arg not in ("self", "cls")]
            if node.returns is None or bare:
                faults.append(f"{node.lineno}: {node.name} {bare}")
    return faults


def public_docstrings_missing(source: str) -> list[str]:
    return [] if ast.get_docstring(ast.parse(source)) or not source.strip() else ["no module docstring"]


@pytest.fixture(params=sources(), ids=module_name)
def path(request: pytest.FixtureRequest) -> Path:
    assert isinstance(request.param, Path)
    return request.param


def test_the_walk_finds_the_code() -> None:
    names = {module_name(path) for path in sources()}
    assert {"flows.recover", "flows.plan", "tasks.prune", "tasks.domain", "tasks.engines.children.score",
            "tasks.store.artifacts", "tasks.algorithms.angular", "deployments.local"} <= names  # fmt: skip


def test_imports_point_inward(path: Path) -> None:
    assert not outward_imports(path.read_text(), module_name(path))


def test_heavy_libraries_stay_in_their_rings(path: Path) -> None:
    assert not heavy_imports(path.read_text(), module_name(path))


def test_nothing_runs_code_that_came_with_data(path: Path) -> None:
    assert not unsafe_code(path.read_text())


def test_every_function_is_annotated(path: Path) -> None:
    assert not untyped_functions(path.read_text())


def test_every_module_says_what_it_does(path: Path) -> None:
    assert not public_docstrings_missing(path.read_text())


def test_modules_are_named_after_what_they_hold(path: Path) -> None:
    assert not FORBIDDEN_NAMES & set(module_name(path).split("."))


def test_one_entry_point_does_not_import_another() -> None:
    """Children are programs: what two of them share is in a module that is none."""
    folder = ROOT / "tasks" / "engines" / "children"
    programs = {module_name(p) for p in folder.glob("*.py") if "__main__" in p.read_text()}
    assert {name.split(".")[-1] for name in programs} == set(CHILDREN)
    for path in folder.glob("*.py"):
        imported = {name for _, name in imports(ast.parse(path.read_text()), module_name(path))}
        assert not imported & (programs - {module_name(path)})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tasks.domain.span", "from tasks.algorithms.angular import ranking"),
        ("tasks.domain.span", "import flows.plan"),
        ("tasks.algorithms.angular", "from tasks.store.artifacts import ArtifactStore"),
        ("tasks.algorithms.angular", "def f():\n    from tasks.engines import child"),
        ("tasks.store.sources", "from tasks.engines.child import run_child"),
        ("tasks.engines.child", "import tasks.store.artifacts"),
        ("tasks.engines.children.score", "from tasks.store.sources import read_table"),
        ("tasks.engines.child", "from ..store import artifacts"),
        ("tasks.store.artifacts", "from tasks.policies import STAGE"),
        ("tasks.prune", "from flows.plan import Plan"),
        ("tasks.prune", "importlib.import_module('flows.plan')"),
        ("tasks.prune", "from deployments.local import environment"),
        ("tasks.prune", "from tests.conftest import build_pico"),
        ("deployments.local", "from tasks.store.artifacts import ArtifactStore"),
        ("deployments.local", "from flows.recover import recover"),
    ],
)
def test_outward_imports_are_found(module: str, source: str) -> None:
    assert outward_imports(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tasks.algorithms.angular", "from tasks.domain.span import Span"),
        ("tasks.engines.child", "from tasks.domain import errors"),
        ("tasks.engines.children.score", "from tasks.engines.children.border import serve"),
        ("tasks.prune", "from tasks.store.artifacts import ArtifactStore\nfrom tasks.policies import STAGE"),
        ("flows.recover", "from tasks.prune import prune\nfrom tasks.store.artifacts import ArtifactStore"),
        ("flows.recover", "from deployments.local import environment\nfrom flows.plan import Plan"),
        ("deployments.local", "from tasks.domain.errors import PipelineError"),
    ],
)
def test_inward_imports_pass(module: str, source: str) -> None:
    assert not outward_imports(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tasks.score", "import torch"),
        ("tasks.store.checkpoint", "from torch import nn"),
        ("tasks.domain.span", "import torch.nn"),
        ("tasks.engines.child", "def f():\n    import vllm"),
        ("tasks.algorithms.prompts", "from transformers import AutoTokenizer"),
        ("flows.plan", "import lm_eval"),
        ("tasks.evaluate", "from peft import PeftModel"),
        ("tasks.algorithms.recovery", "from prefect import task"),
        ("tasks.domain.stage", "import subprocess"),
    ],
)
def test_heavy_imports_are_found(module: str, source: str) -> None:
    assert heavy_imports(source, module)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load",
        "f(trust_remote_code=True)", "options = {'trust_remote_code': True}", "import yaml\nyaml.load(x)",
        "subprocess.run('x', shell=True)", "eval('1')",
    ],
)  # fmt: skip
def test_unsafe_code_is_found(source: str) -> None:
    assert unsafe_code(source)


@pytest.mark.parametrize("source", ["def f(): ...", "def f(a) -> None: ...", "class A:\n    def f(self): ..."])
def test_untyped_functions_are_found(source: str) -> None:
    assert untyped_functions(source)
    assert not untyped_functions("class A:\n    def f(self, *a: int, b: str = '') -> None: ...")
