"""The boundaries of the code, enforced on its syntax: who may import what, and what no file may contain."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = sorted(path.relative_to(ROOT) for path in (ROOT / "trt_core").rglob("*.py"))
NODES = sorted(path.relative_to(ROOT) for path in (ROOT / "nodes").rglob("*.py"))
SHIPPED = [*LIBRARY, *NODES, *(path.relative_to(ROOT) for path in ROOT.glob("__init__.py"))]
OTHERS = [path.relative_to(ROOT) for folder in ("demo", "benchmarks") for path in (ROOT / folder).rglob("*.py")]

COMFYUI = {"folder_paths", "server", "nodes", "execution"}
TENSORRT = {"tensorrt", "tensorrt_rtx", "torch_tensorrt", "modelopt"}
MAY_IMPORT_TENSORRT = ("trt_core/backends/", "trt_core/quantize")
CARRIES_ERRORS_BETWEEN_THREADS = {"trt_core/background.py"}
READS_PICKLES_OF_THIS_USER = {"trt_core/backends/inductor_code.py"}
"""Behind `code_signature.checked`: PyTorch has no other format for what `torch.compile` made."""


def syntax(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def absolute_imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of absolute imports anywhere in the file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]
        elif _is_import_module(node):
            yield node.args[0].value.partition(".")[0]


def _is_import_module(node: ast.AST) -> bool:
    """Whether it is `import_module("name")` or `__import__("name")` with a name that can be read."""
    if not isinstance(node, ast.Call) or not node.args:
        return False
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return called in ("import_module", "__import__") and isinstance(getattr(node.args[0], "value", None), str)


def relative_imports(path: Path, statements: list[ast.stmt]) -> Iterator[str]:
    """Dotted names below the root that the statements import relatively; `from . import a` may name a or itself."""
    package = path.parent.parts
    for node in statements:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = (*base, *(node.module or "").split(".")) if node.module else base
            yield ".".join(module)
            yield from (".".join((*module, alias.name)) for alias in node.names)


def at_import(tree: ast.Module) -> list[ast.stmt]:
    """The statements that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    found: list[ast.stmt] = []
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.stmt):
            found.append(node)
        waiting += ast.iter_child_nodes(node)
    return found


def module_name(path: Path) -> str:
    return ".".join(path.parent.parts if path.name == "__init__.py" else path.with_suffix("").parts)


def all_of(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=str)


def test_there_is_something_to_check() -> None:
    assert Path("trt_core/config.py") in LIBRARY


@all_of([*LIBRARY, *OTHERS])
def test_only_nodes_import_comfyui(path: Path) -> None:
    names = set(absolute_imports(syntax(path)))
    assert not {name for name in names if name in COMFYUI or (name.startswith("comfy") and name != "comfy_kitchen")}


@all_of(SHIPPED)
def test_only_backends_and_quantize_import_tensorrt(path: Path) -> None:
    if not path.as_posix().startswith(MAY_IMPORT_TENSORRT):
        assert not TENSORRT & set(absolute_imports(syntax(path)))


@all_of(LIBRARY)
def test_the_library_stays_inside_itself(path: Path) -> None:
    tree = syntax(path)
    assert all(name.split(".")[0] == "trt_core" for name in relative_imports(path, list(_statements(tree))))
    assert not {"trt_core", "nodes", "demo", "benchmarks", "tests"} & set(absolute_imports(tree))


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.stmt))


def imports_between(paths: list[Path]) -> dict[str, set[str]]:
    """For each module, the modules among `paths` that it needs while it is being imported."""
    names = {module_name(path) for path in paths}
    return {
        module_name(path): set(relative_imports(path, at_import(syntax(path)))) & names - {module_name(path)}
        for path in paths
    }


def test_no_cycle_at_import() -> None:
    try:
        TopologicalSorter(imports_between(LIBRARY)).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


def test_the_cycle_check_sees_the_imports() -> None:
    assert "trt_core.errors" in imports_between(LIBRARY)["trt_core.config"]


@all_of(SHIPPED)
def test_nothing_is_printed(path: Path) -> None:
    calls = (node.func for node in ast.walk(syntax(path)) if isinstance(node, ast.Call))
    assert not [called.lineno for called in calls if isinstance(called, ast.Name) and called.id == "print"]


@all_of(SHIPPED)
def test_no_broad_except_that_swallows(path: Path) -> None:
    handlers = (node for node in ast.walk(syntax(path)) if isinstance(node, ast.ExceptHandler))
    broad = [node for node in handlers if node.type is None or _names(node.type) & {"Exception", "BaseException"}]
    if path.as_posix() not in CARRIES_ERRORS_BETWEEN_THREADS:
        assert not [node.lineno for node in broad if not _raises_again(node)]


def _raises_again(handler: ast.ExceptHandler) -> bool:
    """Whether it ends with a bare `raise`: it cleaned up and hid nothing."""
    return isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None


def _names(expression: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}


@all_of([*SHIPPED, *OTHERS])
def test_no_pickle(path: Path) -> None:
    pickles = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib"} & set(absolute_imports(syntax(path)))
    assert not pickles or path.as_posix() in READS_PICKLES_OF_THIS_USER


@pytest.mark.parametrize("module", ["trt_core", "trt_core.packages", "trt_core.config"])
def test_importing_costs_nothing(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {*TENSORRT, "torch", "diffusers", "transformers"}


def test_importing_the_public_names_leaves_cuda_alone() -> None:
    code = (
        "import sys, trt_core\n"
        "[getattr(trt_core, name) for name in trt_core.__all__]\n"
        "import torch\n"
        "print(torch.cuda.is_initialized(), sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    initialised, loaded = done.stdout.split(" ", 1)
    assert initialised == "False"
    assert not set(ast.literal_eval(loaded)) & TENSORRT
