"""Small faults in a module's source, one at a time, as a tired programmer makes them.

A mutant is told by the function it is in, and by its statement before and after: lines may shift,
and be laid out in another way, without its being another one.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, cast

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATIONS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}
_LIMITS = {"min": "max", "max": "min"}
# What no test of behaviour can see, or what is not behaviour.
_NOT_LOOKED_INTO = {
    "annotation",
    "returns",
    "decorator_list",
    "bases",
    "keywords_of_class",
    "type_comment",
    "type_params",
}


class Mutant(NamedTuple):
    """One fault. `before` and `after` are its statement, of a longer one the first line; `again`
    counts those that look the same in the same function."""

    file: str
    function: str
    before: str
    after: str
    again: int
    line: int
    lines: range  # of the statement, of a longer one of its head; none: runs at the import
    node: int
    variant: int

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """The text that it is told by."""
        return self.file, self.function, self.before, self.after, self.again

    def __str__(self) -> str:
        nth = f" (number {self.again + 1})" if self.again else ""
        return f"{self.file}:{self.line} {self.function}{nth}\n  - {self.before}\n  + {self.after}"


class _Place(NamedTuple):
    """A node's place in the tree, and what it is part of."""

    parent: ast.AST
    field: str
    index: int | None
    node: ast.AST
    function: str
    statement: ast.stmt

    def put(self, node: ast.AST) -> None:
        if self.index is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.index] = node


def mutants(file: str, source: str) -> list[Mutant]:
    """All of them."""
    seen: Counter[tuple[str, str, str]] = Counter()
    found = []
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    bodies = [_whole(function) for function in functions]
    places = list(_places(tree))
    for number, place in enumerate(places):
        faults = _faults(place)
        before = _headline(place.statement) if faults else ""
        for variant, fault in enumerate(faults):
            place.put(fault)
            # A statement that is gone leaves no line of its own.
            after = "pass" if place.node is place.statement else _headline(place.statement)
            if place.node is place.statement and not isinstance(fault, ast.Pass):
                after = _headline(cast(ast.stmt, fault))
            place.put(place.node)
            if after == before:
                continue
            same = place.function, before, after
            line = getattr(place.node, "lineno", place.statement.lineno)
            called = any(place.statement.lineno in body for body in bodies)
            lines = _head(place.statement) if called else range(0)
            found.append(
                Mutant(
                    file, place.function, before, after, seen[same], line, lines, number, variant
                )
            )
            seen[same] += 1
    return found


def mutated(source: str, mutant: Mutant) -> ast.Module:
    """The module with that fault."""
    tree = ast.parse(source)
    place = list(_places(tree))[mutant.node]
    place.put(ast.copy_location(_faults(place)[mutant.variant], place.node))
    return ast.fix_missing_locations(tree)


def _whole(function: ast.FunctionDef) -> range:
    return range(_head(function).start, (function.end_lineno or function.lineno) + 1)


def _head(statement: ast.stmt) -> range:
    # A function that is called tells the line of its first decorator.
    decorators = getattr(statement, "decorator_list", [])
    first = decorators[0].lineno if decorators else statement.lineno
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
    return range(first, max(last, statement.lineno) + 1)


def _headline(statement: ast.stmt) -> str:
    head = copy.copy(statement)
    for name in ("body", "orelse", "handlers", "finalbody", "decorator_list"):
        if hasattr(head, name):
            setattr(head, name, [ast.Pass()] if name == "body" else [])
    return ast.unparse(head).splitlines()[0]


def _places(tree: ast.Module) -> Iterator[_Place]:
    for index, statement in enumerate(tree.body):
        yield from _below(tree, "body", index, statement, "", statement)


def _below(
    parent: ast.AST, field: str, index: int | None, node: ast.AST, function: str, last: ast.stmt
) -> Iterator[_Place]:
    statement = node if isinstance(node, ast.stmt) else last
    if _is_left_out(node) or (isinstance(parent, ast.arguments) and isinstance(node, ast.UnaryOp)):
        return  # the latter is a default of -1, "none"
    yield _Place(parent, field, index, node, function, statement)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        function = f"{function}.{node.name}" if function else node.name
    if isinstance(node, ast.Raise):
        return  # its message
    for name, value in ast.iter_fields(node):
        if name in _NOT_LOOKED_INTO or (isinstance(node, ast.ClassDef) and name == "keywords"):
            continue
        if isinstance(value, list):
            for place, child in enumerate(value):
                if isinstance(child, ast.AST):
                    yield from _below(node, name, place, child, function, statement)
        elif isinstance(value, ast.AST):
            yield from _below(node, name, None, value, function, statement)


def _is_left_out(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id in ("TYPE_CHECKING", "__name__")
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    return isinstance(node, (ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom))


def _faults(place: _Place) -> list[ast.AST]:
    node = place.node
    if isinstance(node, ast.stmt):
        return list(_faults_of_statement(node, place))
    if not place.function:
        return []  # tables and constants, which others hold against the specification
    return list(_faults_of_expression(node, place))


def _faults_of_statement(node: ast.stmt, place: _Place) -> Iterator[ast.AST]:
    if not place.function:
        return
    if isinstance(node, (ast.Expr, ast.Delete, ast.Raise, ast.AugAssign)):
        yield ast.Pass()
    elif isinstance(node, ast.Assign):
        # Without a local one nothing would run at all; nor in most cases without those of __init__.
        stored = any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets)
        if stored and not place.function.endswith(".__init__"):
            yield ast.Pass()
    elif isinstance(node, ast.Return):
        if node.value is None:
            yield ast.Pass()
        elif not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield ast.Return(None)
    elif isinstance(node, ast.Break):
        yield ast.Continue()
    elif isinstance(node, ast.Continue):
        yield ast.Break()
    elif isinstance(node, (ast.If, ast.While)):
        test = ast.UnaryOp(ast.Not(), node.test)
        if not isinstance(node.test, (ast.Compare, ast.UnaryOp)):  # whose operators are changed
            yield type(node)(test, node.body, node.orelse)
    elif isinstance(node, ast.With) and all(item.optional_vars is None for item in node.items):
        yield ast.If(ast.Constant(True), node.body, [])
    if isinstance(node, ast.AugAssign) and type(node.op) in _OPERATIONS:
        yield ast.AugAssign(node.target, _OPERATIONS[type(node.op)](), node.value)


def _faults_of_expression(node: ast.AST, place: _Place) -> Iterator[ast.AST]:
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            ops = list(node.ops)
            ops[index] = _COMPARISONS[type(operator)]()
            yield ast.Compare(node.left, ops, node.comparators)
            if isinstance(operator, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)):
                yield ast.Constant(True)
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield ast.BoolOp(other, node.values)
        for index in range(len(node.values)):
            rest = [value for number, value in enumerate(node.values) if number != index]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.UnaryOp):
        if isinstance(node.op, (ast.Not, ast.Invert)):
            yield node.operand
    elif isinstance(node, ast.BinOp):
        if type(node.op) in _OPERATIONS and not _is_a_type(node):
            yield ast.BinOp(node.left, _OPERATIONS[type(node.op)](), node.right)
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, int):
            yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Call):
        limit = _LIMITS.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if limit is not None:
            yield ast.Call(ast.Name(limit, ast.Load()), node.args, node.keywords)


def _is_a_type(node: ast.BinOp) -> bool:
    return isinstance(node.op, ast.BitOr) and any(
        isinstance(side, ast.Constant) and side.value is None for side in (node.left, node.right)
    )
