"""Every module can be imported by itself: what moved is not missed by somebody who asks for it late."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import sam3jax

MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(sam3jax.__path__, "sam3jax.")
    if not m.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports(name):
    importlib.import_module(name)
