"""What may import what, what importing costs, and what every module owes its readers."""

from __future__ import annotations

import ast
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests import floor

ROOT = Path(__file__).parent.parent
CORE = {"torch", "pydantic", "yaml", "networkx", "safetensors", "numpy", "regex", "psutil"}
# the command line may have its own, but `import fxshare` does not import the command line
COMMAND_LINE = {"typer", "rich", "click"}
EXTRAS = ("transformers", "tokenizers", "onnx", "onnxscript", "onnxruntime", "matplotlib")
EXTRAS += ("pyarrow",)


def _files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs when the module is imported: not in functions, not for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if _is_type_checking(child):
            assert isinstance(child, ast.If)
            for statement in child.orelse:
                yield from (statement, *_at_import_time(statement))
            continue
        yield child
        yield from _at_import_time(child)


def _imported(nodes: Iterator[ast.AST]) -> Iterator[tuple[int, str]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            yield node.lineno, str(node.module).partition(".")[0]


def _tree(path: Path) -> ast.Module:
    return floor.tree(path.read_text(encoding="utf-8"))


def test_passes_import_torch_and_the_standard_library_only() -> None:
    allowed = {"passes", "torch"} | sys.stdlib_module_names
    wrong = [
        (path.name, *found)
        for path in _files("passes")
        for found in _imported(ast.walk(_tree(path)))
        if found[1] not in allowed
    ]
    assert not wrong


def test_fxshare_imports_extras_lazily() -> None:
    core = {"fxshare", "passes"} | CORE | set(sys.stdlib_module_names)
    wrong = []
    for path in _files("fxshare"):
        shown = "cli" in path.parts or path.name in {"cli.py", "__main__.py", "progress.py"}
        allowed = core | COMMAND_LINE if shown else core
        for found in _imported(_at_import_time(_tree(path))):
            if found[1] not in allowed:
                wrong.append((str(path.relative_to(ROOT)), *found))
    assert not wrong, f"import these inside the functions that need them: {wrong}"


def test_the_checks_above_find_what_they_look_for() -> None:
    source = """
import torch, transformers.models
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import onnx
else:
    import matplotlib
try:
    from tokenizers import Tokenizer
except ImportError:
    pass
class A:
    import rich
    def f(self):
        import safetensors
"""
    found = {name for _, name in _imported(_at_import_time(ast.parse(source)))}
    assert found == {"torch", "transformers", "typing", "matplotlib", "tokenizers", "rich"}


_MEASURE = """
import json, sys, time
import fxshare
assert "torch" not in sys.modules
assert set(fxshare.__all__) <= set(dir(fxshare))
start = time.process_time()
import torch
middle = time.process_time()
from fxshare import *  # names are loaded when they are used: this uses them all
end = time.process_time()
print(json.dumps({"torch": middle - start, "fxshare": end - middle, "modules": list(sys.modules)}))
assert callable(fxshare.export)
homes = {getattr(fxshare, name).__module__.partition(".")[0] for name in fxshare.__all__}
assert homes == {"fxshare", "passes"}
assert fxshare.sites.match.match
assert not hasattr(fxshare, "nothing") and not hasattr(fxshare, "_home")
"""


def test_importing_is_fast_pulls_in_no_extra_and_no_torch_before_it_is_used() -> None:
    # beside torch's own, in processor time: another machine, or a busy one, is slower at both
    best = float("inf")
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        tops = {name.partition(".")[0] for name in found["modules"]}
        assert not tops & {*EXTRAS, "typer"}
        best = min(best, found["fxshare"] / found["torch"])
        if best < 1.25:
            break
    assert best < 1.25, f"importing all of fxshare takes {best:.2f} times torch's"


def _public() -> Iterator[tuple[str, object]]:
    for package in ("fxshare", "passes"):
        root = import_module(package)
        names = [package, *(m.name for m in pkgutil.walk_packages(root.__path__, f"{package}."))]
        for name in names:
            if name.endswith("__main__"):
                continue
            module = import_module(name)
            yield name, module
            for attribute, value in vars(module).items():
                ours = getattr(value, "__module__", None) == name
                plain = inspect.isclass(value) or inspect.isfunction(value)
                if ours and plain and not attribute.startswith("_"):
                    yield f"{name}.{attribute}", value


def test_everything_public_has_a_docstring() -> None:
    bare = [name for name, value in _public() if not (getattr(value, "__doc__", "") or "").strip()]
    # a dataclass without a docstring gets its signature for one
    bare += [
        name
        for name, value in _public()
        if inspect.isclass(value) and (value.__doc__ or "").startswith(f"{value.__name__}(")
    ]
    assert not bare, bare


def _empty_at_module_level(tree: ast.Module) -> Iterator[int]:
    for node in tree.body:
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        literal = isinstance(value, (ast.List, ast.Dict, ast.Set)) and not ast.unparse(value)[1:-1]
        call = isinstance(value, ast.Call) and ast.unparse(value) in {"dict()", "list()", "set()"}
        if literal or call:
            yield node.lineno


def test_no_module_level_registries() -> None:
    """An empty list, dict or set at module level is there to be filled; ``__all__`` is not."""
    found = [
        (str(path.relative_to(ROOT)), line)
        for path in _files("passes") + _files("fxshare")
        for line in _empty_at_module_level(_tree(path))
    ]
    assert not found
    assert list(_empty_at_module_level(ast.parse("a = []\nb = [1]\nc: dict = dict()"))) == [1, 3]


# the structure; `python -m tests.floor` prints its figures ----------------------------------------


def test_imports_point_from_later_stages_to_earlier_ones() -> None:
    assert floor.upward(floor.imports(floor.sources())) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert floor.circles(floor.imports(floor.sources())) == []


def test_the_solver_stands_alone() -> None:
    assert floor.outside_the_solver(floor.sources()) == []


def test_stages_are_folders() -> None:
    assert {Path(file).name for file in floor.at_the_top(floor.sources())} <= floor.TOP_FILES


def test_files_and_functions_stay_small() -> None:
    files = floor.sources()
    assert floor.too_long_files(files) == []
    assert floor.too_long_functions(files) == []


def test_only_public_verbs_have_many_parameters() -> None:
    free = floor.public_verbs()
    assert ("fxshare.compiling.compile", "compile") in free
    assert ("fxshare.cli.bench.run", "run") in free
    assert floor.too_many_parameters(floor.sources(), free) == []


def test_the_order_of_stages_is_that_of_every_import() -> None:
    late = "from fxshare.store.save import save"
    source = {
        "fxshare/sites/match.py": "from fxshare.errors import MatchError",
        "fxshare/errors.py": "from passes.errors import FxShareError",
        "fxshare/store/save.py": "import fxshare.sites.match",
        "fxshare/sites/site.py": f"def f() -> None:\n    {late}",
        "fxshare/data/batches.py": f"if TYPE_CHECKING:\n    {late}",
        "fxshare/capture/call.py": "import fxshare.data.batches as b",  # of one line
        "fxshare/plans/plan.py": "import fxshare",
        "fxshare/__init__.py": late,
        "passes/errors.py": "from fxshare import errors",
    }
    assert floor.upward(floor.imports(source)) == [
        "fxshare.capture.call imports fxshare.data.batches",
        "fxshare.data.batches imports fxshare.store.save",
        "fxshare.plans.plan imports fxshare",
        "fxshare.sites.site imports fxshare.store.save",
        "passes.errors imports fxshare.errors",
    ]
    with pytest.raises(AssertionError, match=r"\['utils'\] stand in no line of STAGES"):
        floor.upward(floor.imports({"fxshare/utils/lists.py": ""}))
    with pytest.raises(AssertionError, match="line 1: relative import"):
        floor.imports({"fxshare/sites/match.py": "from .site import Site"})


def test_circles_are_found_through_functions_and_packages() -> None:
    source = {
        "fxshare/sites/__init__.py": "from fxshare.sites.match import match",
        "fxshare/sites/match.py": "def f() -> None:\n    from fxshare.sites.rows import rows",
        "fxshare/sites/rows.py": "from fxshare.sites import match_all",
        "fxshare/sites/site.py": "import fxshare.sites.match",
    }
    rings = floor.circles(floor.imports(source))
    assert rings == [["fxshare.sites", "fxshare.sites.match", "fxshare.sites.rows"]]


def test_what_the_solver_may_not_import_is_found() -> None:
    source = {
        "fxshare/planning/solver/solve.py": """
import numpy as np
from fxshare.errors import PlanError
from fxshare.planning.solver.curve import hull
def f():
    import torch.nn
    from fxshare.plans.plan import Plan
if TYPE_CHECKING:
    from fxshare.planning.options import Options
    from passes import Pass
""",
        "fxshare/planning/options.py": "import torch",
    }
    assert sorted(line.rpartition(" ")[2] for line in floor.outside_the_solver(source)) == [
        "fxshare.planning.options.Options",
        "fxshare.plans.plan.Plan",
        "passes.Pass",
        "torch.nn",
    ]


def test_what_is_too_large_is_found() -> None:
    body = "    x = 0\n" * floor.LONGEST_BODY
    many = ", ".join(f"a{n}" for n in range(floor.MOST_PARAMETERS))
    text = '"""Two\nlines."""'
    source = {
        "fxshare/top.py": "\n" * (floor.MOST_LINES + 1),
        "fxshare/sites/long.py": f"def f():\n    {text}\n{body}    x = 1",
        "fxshare/sites/documented.py": f"def f():\n    {text}\n{body}",
        "fxshare/sites/wide.py": f"class A:\n    async def f(self, {many}): pass",
        "fxshare/sites/ways.py": f"def f({many}, *rest): pass\ndef g({many}): pass",
        "fxshare/cli/verb.py": f"def verb({many}, *, debug): pass",
    }
    assert floor.at_the_top(source) == ["fxshare/top.py"]
    assert floor.too_long_files(source) == ["fxshare/top.py: 401 lines"]
    assert floor.too_long_functions(source) == ["fxshare/sites/long.py:1 f: 61 lines"]
    free = frozenset({("fxshare.cli.verb", "verb")})
    assert floor.too_many_parameters(source, free) == [
        "fxshare/sites/wide.py:2 f: 11 parameters",
        "fxshare/sites/ways.py:1 f: 11 parameters",
    ]
