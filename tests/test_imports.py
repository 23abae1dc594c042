"""Imports go one way: the order of the rooms, and what no file of the package may import."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. A room may import those of the lines above its own, and itself.
FLOORS = (
    ("errors",),
    ("types", "boxes", "files"),
    ("checksums",),
    ("config",),
    ("options",),
    ("data", "model"),
    ("weights",),
    ("matching", "clicks"),
    ("losses",),
    ("inference",),
    ("video",),
    ("viewing",),
    ("evaluation",),
    ("tasks",),
    ("training",),
    (
        "predict_video",
        "predict_clicks",
        "evaluate_clicks",
        "doctor_videos",
    ),  # halves of the doors below
    ("train", "evaluate", "predict", "doctor", "report", "settings", "plan", "export", "app"),
    ("demo_video",),  # the half of `demo` for videos
    ("demo",),  # trains and evaluates
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(f.relative_to(ROOT) for f in (ROOT / "sam3jax").rglob("*.py"))
CONVERT = sorted(f.relative_to(ROOT) for f in (ROOT / "convert").rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, in functions too.

    Not what it imports as a script (`if __name__ == "__main__"`), which is the command's way in, and not
    what it imports for the type checker alone.
    """
    package = file.with_suffix("").parts[:-1]
    nodes: list[ast.AST] = [ast.parse((ROOT / file).read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ("__main__" in ast.unparse(node.test) or "TYPE_CHECKING" in ast.unparse(node.test)):  # fmt: skip
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            # `from sam3jax import evaluate` imports a room; names of a module end in no room.
            yield from (f"{module}.{alias.name}" for alias in node.names)
        nodes.extend(ast.iter_child_nodes(node))


def room(module: str) -> str | None:
    """The room of a module of the package, None for another package."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "sam3jax" and rest else None


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_one_way(file):
    own = file.parts[1].removesuffix(".py")
    if own == "__init__":  # the face: names are imported when they are first used
        assert not [m for m in imports(file) if m.startswith("sam3jax")]
        return
    assert own in FLOOR, f"{file}: say on which floor {own} lies, in FLOORS"
    for module in imports(file):
        other = room(module)
        if other in (None, own) or (own, other) == ("cli", "__version__"):
            continue
        assert other in FLOOR, f"{file} imports {module}, which lies in no room"
        doors = FLOOR[other] == FLOOR["train"]
        assert FLOOR[other] < FLOOR[own], f"{file} imports {module}, from {'a door' if doors else 'above'}"  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=str)
def test_the_package_imports_neither_torch_nor_convert(file):
    outside = {module.partition(".")[0] for module in imports(file)}
    assert not outside & {"torch", "torchvision", "convert", "tests", "scripts", "sam3", "transformers"}  # fmt: skip


def test_two_files_reach_convert_by_its_name():
    """The command, and what `init` may be; both only when they are asked for it."""
    named = {str(f) for f in FILES if re.search(r"[\"']convert\.\w+[\"']", (ROOT / f).read_text())}
    assert named == {"sam3jax/cli.py", "sam3jax/weights/start.py"}


@pytest.mark.parametrize("file", CONVERT, ids=str)
def test_convert_stands_on_weights_and_below(file):
    for module in imports(file):
        if other := room(module):
            assert FLOOR[other] <= FLOOR["weights"], f"{file} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_only_one_file_imports_orbax(file):
    if any(module.startswith("orbax") for module in imports(file)):
        assert file == Path("sam3jax/weights/checkpoints.py")
