"""Nested dictionaries of arrays by path: the one walker of parameter trees and configurations."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

Tree = dict[str, Any]
Path = tuple[str, ...]


def leaf(tree: Mapping[str, Any], path: Path) -> Any:
    """The value at a path. Raises KeyError."""
    return functools.reduce(lambda node, key: node[key], path, tree)


def has(tree: Mapping[str, Any], path: Path) -> bool:
    """Whether there is a value at a path."""
    try:
        leaf(tree, path)
    except (KeyError, TypeError):
        return False
    return True


def put(tree: Tree, path: Path, value: Any) -> None:
    """Set the value at a path, making what lies between."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def flatten(tree: Mapping[str, Any], start: Path = ()) -> dict[Path, Any]:
    """{"a": {"b": 1}} -> {("a", "b"): 1}."""
    flat: dict[Path, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, (*start, key))
        else:
            flat[(*start, key)] = value
    return flat


def unflatten(flat: Mapping[Path, Any]) -> Tree:
    """Undo `flatten`."""
    tree: Tree = {}
    for path, value in flat.items():
        put(tree, path, value)
    return tree


def dotted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    return {".".join(path): value for path, value in flatten(tree).items()}


def overlay(top: Mapping[str, Any], below: Mapping[str, Any]) -> Tree:
    """The tree `below` with the leaves of `top` in their places."""
    tree = dict(below)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(below.get(key), Mapping)
        tree[key] = overlay(value, below[key]) if both else value
    return tree
