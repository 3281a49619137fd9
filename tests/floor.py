"""What holds the structure of the packages, in figures.

::

    python -m tests.floor

prints how many files there are, how many of them lie in import circles, how many imports point
upward, how many files lie directly in ``fxshare/``, and the longest file, the longest function and
the function with the most parameters, each with the place and the limit. ``test_architecture.py``
holds the packages to the same limits.

Every function here takes :data:`Sources`, so that a test can hand it a broken package.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import networkx as nx

ROOT = Path(__file__).parent.parent
PACKAGES = ("passes", "fxshare")

Sources: TypeAlias = Mapping[str, str]
"""Text by file, named from the root of the repository: ``fxshare/sites/match.py``."""

STAGES: tuple[tuple[str, ...], ...] = (
    ("passes",),
    ("errors",),
    ("base", "models", "config", "embedded"),
    ("capture", "data"),
    ("sites",),
    ("plans", "calibration", "proposing"),
    ("factors", "cost_model", "result"),
    ("planning", "verifying", "dynamo"),
    ("rewriting", "store", "views", "estimating"),
    ("refining",),
    ("generation",),
    ("exporting",),
    ("compiling", "loading"),
    ("hf", "__init__"),
    ("bench",),
    ("cli",),
    ("__main__",),
)
"""The order of the stages: one imports those above it, and none of its own line or below it. A
stage is a folder or file of ``fxshare/``; ``passes`` is the other package, as a whole."""

TOP_FILES = frozenset({"__init__.py", "__main__.py", "errors.py", "hf.py"})
MOST_LINES = 400
LONGEST_BODY = 60
MOST_PARAMETERS = 10
_SOLVER = "fxshare.planning.solver"


def sources() -> dict[str, str]:
    """The sources of both packages."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


# imports --------------------------------------------------------------------------------------


def module_of(file: str) -> str:
    """``fxshare/sites/match.py`` as ``fxshare.sites.match``; ``__init__.py`` as its folder."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def stage_of(module: str) -> str:
    """The stage that a module of either package belongs to."""
    package, _, rest = module.partition(".")
    if package == "passes":
        return package
    return rest.partition(".")[0] or "__init__"


@functools.cache
def tree(text: str) -> ast.Module:
    """The syntax tree of a source, made once for all that look at it."""
    return ast.parse(text)


def named(text: str) -> Iterator[str]:
    """What a file imports, by dotted name: in functions and for type checkers as well."""
    for node in ast.walk(tree(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(files: Sources) -> dict[str, set[str]]:
    """By module, the modules of our own that it imports: of ``from a.b import c`` the module
    ``a.b.c`` where there is one, else ``a.b``."""
    modules = {module_of(file): text for file, text in files.items()}
    found: dict[str, set[str]] = {}
    for module, text in modules.items():
        found[module] = set()
        for name in named(text):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name:
                found[module].add(name)
    return found


def upward(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports of a later stage, or of another stage of the same line of :data:`STAGES`."""
    level = {stage: number for number, line in enumerate(STAGES) for stage in line}
    strangers = sorted({stage_of(module) for module in graph} - set(level))
    assert not strangers, f"{strangers} stand in no line of STAGES: say what they may import"
    return [
        f"{module} imports {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if stage_of(module) != stage_of(other) and level[stage_of(other)] >= level[stage_of(module)]
    ]


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others."""
    edges = nx.DiGraph((a, b) for a, others in graph.items() for b in others)
    return sorted(
        sorted(ring)
        for ring in nx.strongly_connected_components(edges)
        if len(ring) > 1 or any(edges.has_edge(one, one) for one in ring)
    )


def outside_the_solver(files: Sources) -> list[str]:
    """What the files of ``planning/solver/`` import that they may not: torch, ``passes``, or any
    stage but ``errors``. The solver knows costs and losses, and neither models nor tensors."""
    found = []
    for file, text in files.items():
        if not (module_of(file) + ".").startswith(f"{_SOLVER}."):
            continue
        for name in named(text):
            top = name.partition(".")[0]
            own = (name + ".").startswith((f"{_SOLVER}.", "fxshare.errors."))
            if top in ("torch", *PACKAGES) and not own:
                found.append(f"{file} imports {name}")
    return found


# sizes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """A function or method. ``lines`` are those of its body after its docstring, since a parameter
    list that is documented is no complexity; ``parameters`` counts ``self`` and ``*args`` as
    well."""

    file: str
    name: str
    line: int
    lines: int
    parameters: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.name}"


def functions(files: Sources) -> list[Function]:
    """Every function of the sources, those inside of others too."""
    return [
        _function(file, node)
        for file, text in files.items()
        for node in ast.walk(tree(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def _function(file: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function:
    first, end = node.body[0], node.end_lineno
    before = first.lineno - 1
    if ast.get_docstring(node) is not None:
        before = first.end_lineno or before
    assert end is not None
    a = node.args
    plain = [*a.posonlyargs, *a.args, *a.kwonlyargs]
    count = len(plain) + (a.vararg is not None) + (a.kwarg is not None)
    return Function(file, node.name, node.lineno, end - before, count)


def lines_of(files: Sources) -> dict[str, int]:
    """Lines by file."""
    return {file: len(text.splitlines()) for file, text in files.items()}


def too_long_files(files: Sources) -> list[str]:
    """Files of more than :data:`MOST_LINES` lines."""
    return [f"{file}: {n} lines" for file, n in lines_of(files).items() if n > MOST_LINES]


def too_long_functions(files: Sources) -> list[str]:
    """Functions whose body is longer than :data:`LONGEST_BODY` lines."""
    return [f"{one}: {one.lines} lines" for one in functions(files) if one.lines > LONGEST_BODY]


def too_many_parameters(files: Sources, free: frozenset[tuple[str, str]]) -> list[str]:
    """Functions with more than :data:`MOST_PARAMETERS` parameters that are not ``free``."""
    return [
        f"{one}: {one.parameters} parameters"
        for one in functions(files)
        if one.parameters > MOST_PARAMETERS and (module_of(one.file), one.name) not in free
    ]


def at_the_top(files: Sources) -> list[str]:
    """The files directly in ``fxshare/``."""
    return [file for file in files if file.count("/") == 1 and file.startswith("fxshare/")]


def public_verbs() -> frozenset[tuple[str, str]]:
    """Module and name of the functions of ``fxshare.__all__`` and of the commands: they may have as
    many parameters as users have wishes, each named and documented."""
    import fxshare
    from fxshare.cli import make_app

    def commands(app: Any) -> Iterator[Any]:
        yield from (command.callback for command in app.registered_commands)
        for group in app.registered_groups:
            yield from commands(group.typer_instance)

    verbs = [getattr(fxshare, name) for name in fxshare.__all__]
    verbs = [*filter(inspect.isfunction, verbs), *commands(make_app())]
    plain = [inspect.unwrap(verb) for verb in verbs]
    return frozenset((verb.__module__, verb.__name__) for verb in plain)


def main() -> None:
    """Print the figures."""
    files = sources()
    graph = imports(files)
    free = public_verbs()
    inside = functions(files)
    lines = lines_of(files)
    longest_file = max(lines, key=lines.__getitem__)
    longest = max(inside, key=lambda one: one.lines)
    held = [one for one in inside if (module_of(one.file), one.name) not in free]
    most, widest = (max(some, key=lambda one: one.parameters) for some in (held, inside))
    top = at_the_top(files)
    print(f"files: {len(files)} in {' and '.join(PACKAGES)}")
    print(f"files in import circles: {sum(map(len, circles(graph)))} (at most 0)")
    print(f"upward imports: {len(upward(graph))} (at most 0)")
    print(f"imports out of the solver: {len(outside_the_solver(files))} (at most 0)")
    print(f"files directly in fxshare: {len(top)} (at most {len(TOP_FILES)})")
    print(f"longest file: {lines[longest_file]} lines, {longest_file} (at most {MOST_LINES})")
    print(f"longest function: {longest.lines} lines, {longest} (at most {LONGEST_BODY})")
    print(f"most parameters: {most.parameters}, {most} (at most {MOST_PARAMETERS})")
    print(f"most parameters of a public verb: {widest.parameters}, {widest} (no limit)")


if __name__ == "__main__":
    main()
