"""Work counting in parsed Jinja templates: filters are added that charge the passes of loops and the operands of operators."""

from __future__ import annotations

from typing import Any

from jinja2 import nodes

CHARGE_PASS, CHARGE_READ = "mmtune pass", "mmtune read"
"""Names of the added filters. A template cannot use them: they are not valid Jinja names."""
PASS = 20
"""Units of one pass, besides those of its body."""

_BODIES: Any = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)


def count_work(template: nodes.Template) -> None:
    """Charge every pass of a loop, macro, call or block, and the operands of operators that Jinja compiles to Python's."""
    _charge_operands(template)
    for loop in template.find_all(nodes.For):
        if loop.test is not None:
            loop.test = _at(loop.test, nodes.And(_passing(PASS), loop.test))
    for block in list(template.find_all(_BODIES)):
        counted = nodes.ExprStmt(_passing(PASS + sum(map(_length, block.body))))
        block.body = [_at(block, counted), *block.body]


def _passing(units: int) -> nodes.Expr:
    return nodes.Filter(nodes.Const(units), CHARGE_PASS, [], [], None, None)


def _reading(value: nodes.Expr) -> nodes.Expr:
    return value if isinstance(value, nodes.Const) else _at(value, nodes.Filter(value, CHARGE_READ, [], [], None, None))


def _at(place: nodes.Node, node: Any) -> Any:
    return node.set_lineno(place.lineno).set_environment(place.environment)


def _length(node: nodes.Node) -> int:
    """Number of expressions and text characters in a template node. A loop inside it is charged again for each pass."""
    parts = [node, *node.find_all(nodes.Node)]
    return sum(len(part.data) if isinstance(part, nodes.TemplateData) else 1 for part in parts)


def _charge_operands(node: nodes.Node) -> None:
    """Charge the operands that the sandbox does not intercept: of `~`, comparisons and slices, and keys of objects."""
    for child in node.iter_child_nodes():
        _charge_operands(child)
    if isinstance(node, nodes.Concat):
        node.nodes = [_reading(each) for each in node.nodes]
    elif isinstance(node, nodes.Compare):
        constant = isinstance(node.expr, nodes.Const) or isinstance(node.ops[0].expr, nodes.Const)
        if len(node.ops) > 1 or not (constant and node.ops[0].op in ("eq", "ne")):
            node.expr = _reading(node.expr)
            for operand in node.ops:
                operand.expr = _reading(operand.expr)
    elif isinstance(node, nodes.Pair):
        node.key = _reading(node.key)
    elif isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice):
        node.arg = _reading(node.arg)
    for name, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, name, [_reading(each) if _is_slice(each) else each for each in value])
        elif _is_slice(value):
            setattr(node, name, _reading(value))


def _is_slice(node: Any) -> bool:
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
