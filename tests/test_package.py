"""The wheel: every package in it, and the configurations, which are found from any folder."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from sam3jax.config import ConfigError, load_config
from sam3jax.config.loading import find_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_every_package_is_named_in_pyproject():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [f for top in ("sam3jax", "convert") for f in (ROOT / top, *(ROOT / top).rglob("*"))]
    packages = {".".join(f.relative_to(ROOT).parts) for f in folders if any(f.glob("*.py"))}
    assert set(named) == packages | {"sam3jax.configs"}, "correct [tool.setuptools] packages"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What `pip install .` would unpack, built from a copy so that nothing appears in the sources."""
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("sam3jax", "convert", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_holds_the_sources_the_model_and_the_configurations(installed):
    files = {str(f.relative_to(installed)) for f in installed.rglob("*") if f.is_file()}
    for top in ("sam3jax", "convert"):
        wanted = {str(f.relative_to(ROOT)) for f in (ROOT / top).rglob("*.py")}
        wanted |= {str(f.relative_to(ROOT)) for f in (ROOT / top).glob("assets/*/*")}
        assert wanted <= files
    assert {f"sam3jax/configs/{f.name}" for f in CONFIGS} <= files
    assert "sam3jax/py.typed" in files
    assert not any(f.startswith(("tests", "scripts", "configs")) for f in files)


def test_an_installed_command_finds_its_configurations_in_an_empty_folder(installed, tmp_path):
    code = """
import sam3jax.cli
from sam3jax.config import load_config
from sam3jax.config.loading import find_config
from sam3jax.options import DEMO
from sam3jax.weights.model_folder import locate
print(find_config("demo"))
assert load_config("demo") == load_config(DEMO) == load_config("demo.yaml")
assert locate(load_config(DEMO).init).is_dir()
assert sam3jax.cli.main(["settings", "lora"]) == 0
"""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[0] == str(installed / "sam3jax" / "configs" / "demo.yaml")
    assert "lora.rank" in ended.stdout


@pytest.mark.parametrize("name", [f.stem for f in CONFIGS])
def test_a_shipped_configuration_is_found_by_name_from_anywhere(name, tmp_path, monkeypatch):
    expected = load_config(ROOT / "configs" / f"{name}.yaml")
    monkeypatch.chdir(tmp_path)
    for way in (name, f"{name}.yaml", f"configs/{name}.yaml", Path("configs") / f"{name}.yaml"):
        assert load_config(way) == expected


def test_a_file_of_the_user_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("steps: 7\n")
    assert load_config("configs/demo.yaml").steps == 7
    assert load_config("demo").steps != 7
    (tmp_path / "demo").mkdir()
    assert find_config("demo").is_file()


@pytest.mark.parametrize("name", ["nowhere", "nowhere.yaml", "elsewhere/demo.yaml", "/demo.yaml", "../demo.yaml", "demo.json", ""])  # fmt: skip
def test_other_names_are_refused_with_the_list(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match="or one of clicks, clicks_slices, clips, demo, full_finetune"
    ):
        load_config(name)
