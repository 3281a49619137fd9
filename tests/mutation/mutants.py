"""Small changes of a function that tests should notice, on its syntax tree.

The operators are the usual ones (Offutt et al., ACM TOSEM 5, 1996): comparisons, arithmetic,
connectives, conditions, constants, returned values and statements left out. Texts, log lines,
annotations, defaults and what is raised inside ``raise`` are left alone.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
_CALLED = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """The ``number``-th change of the function ``name`` of a file, in the line ``text``."""

    file: str
    name: str
    line: int
    number: int
    change: str
    text: str
    nth: int = 1
    """Which of the same changes in equal lines of the function."""

    @property
    def key(self) -> str:
        """What tells it from the file's other mutants and stays when lines are added above."""
        again = f" ({self.nth})" if self.nth > 1 else ""
        return f"{self.file}:{self.name}:{self.change}{again} at {self.text}"

    def __str__(self) -> str:
        return f"line {self.line} {self.key}"


def mutants_of(file: Path, name: str) -> list[Mutant]:
    """Every mutant of a source file."""
    found = []
    source = file.read_text()
    lines = source.splitlines()
    for qualified, function in _functions(ast.parse(source)).items():
        met: Counter[tuple[str, str]] = Counter()
        for number, (node, change) in enumerate(_changes(function)):
            text = lines[node.lineno - 1].strip()
            met[change, text] += 1
            nth = met[change, text]
            found.append(Mutant(name, qualified, node.lineno, number, change, text, nth))
    return found


def mutated(file: Path, mutant: Mutant) -> tuple[int, CodeType]:
    """The first line of the mutant's function, and its code with the change."""
    tree = ast.parse(file.read_text())
    function = _functions(tree)[mutant.name]
    node, _ = list(_changes(function))[mutant.number]
    _change(node, mutant.change)
    ast.fix_missing_locations(tree)
    code = compile(tree, str(file), "exec", dont_inherit=True)
    for inner in _codes(code):
        if inner.co_qualname == mutant.name:
            return inner.co_firstlineno, inner
    raise LookupError(str(mutant))


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Functions of the module and of its classes, by qualified name.

    What is inside a function belongs to it. Names given twice (a property's setter) are left out.
    """
    found: dict[str, ast.FunctionDef] = {}
    twice: set[str] = set()
    todo: list[tuple[str, ast.AST]] = [("", tree)]
    while todo:
        prefix, node = todo.pop(0)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                todo.append((f"{prefix}{child.name}.", child))
            elif isinstance(child, ast.FunctionDef) and child.name not in ("__repr__", "__str__"):
                name = prefix + child.name
                if name in found:
                    twice.add(name)
                found[name] = child
    return {name: function for name, function in found.items() if name not in twice}


def _changes(function: ast.FunctionDef) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Nodes and what is done to them, in one order."""
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop(0)
        if isinstance(node, (ast.Assert, ast.Raise)) or _is_said(node):
            if isinstance(node, ast.Raise) and node.exc is not None:
                yield node, "left out"
            continue
        yield from ((node, change) for change in _names(node))  # type: ignore[misc]
        if isinstance(node, ast.AnnAssign):
            todo = [*([node.value] if node.value is not None else []), *todo]
        elif isinstance(node, ast.FunctionDef):
            todo = [*node.body, *todo]
        elif not isinstance(node, ast.JoinedStr):
            todo = [*ast.iter_child_nodes(node), *todo]


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARED:
        new = _COMPARED[type(node.ops[0])].__name__
        yield f"{type(node.ops[0]).__name__} to {new}"
    elif isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED and not _has_text(node):
        yield f"{type(node.op).__name__} to {_COMPUTED[type(node.op)].__name__}"
    elif isinstance(node, ast.BoolOp):
        yield "And to Or" if isinstance(node.op, ast.And) else "Or to And"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield f"{type(node.op).__name__} left out"
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield from ("never", "always") if not isinstance(node, ast.While) else ("never",)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield f"{node.value!r} changed"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLED:
        yield f"{node.func.id} to {_CALLED[node.func.id]}"
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield "returns None"
    elif isinstance(node, ast.Continue):
        yield "break instead"
    elif isinstance(node, (ast.Expr, ast.AugAssign, ast.Delete)):
        yield "left out"


def _change(node: ast.AST, change: str) -> None:
    if isinstance(node, ast.Compare):
        node.ops[0] = _COMPARED[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp):
        node.op = _COMPUTED[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp):
        same = ast.UnaryOp(ast.UAdd(), node.operand)
        _become(node, node.operand if isinstance(node.op, ast.Not) else same)
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        node.test = ast.copy_location(ast.Constant(change == "always"), node.test)
    elif isinstance(node, ast.Constant):
        value = node.value
        assert isinstance(value, (bool, int, float))
        node.value = (not value) if isinstance(value, bool) else value + 1
    elif isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        node.func.id = _CALLED[node.func.id]
    elif isinstance(node, ast.Return):
        node.value = ast.copy_location(ast.Constant(None), node)
    elif isinstance(node, ast.Continue):
        _become(node, ast.Break())
    else:
        _become(node, ast.Pass())


def _become(node: ast.AST, other: ast.AST) -> None:
    """Turn a node into another one where it stands."""
    place = copy.copy(node)
    node.__class__ = other.__class__
    node.__dict__.clear()
    node.__dict__.update(other.__dict__)
    ast.copy_location(node, place)


def _is_said(node: ast.AST) -> bool:
    """A docstring or a log line."""
    if not isinstance(node, ast.Expr):
        return False
    if isinstance(node.value, ast.Constant):
        return True
    return isinstance(node.value, ast.Call) and "_LOG" in ast.unparse(node.value.func)


def _has_text(node: ast.BinOp) -> bool:
    sides = (node.left, node.right)
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in sides
    )


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
