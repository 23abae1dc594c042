"""The command: cheap help, one exit status for errors of the user, settings anywhere, the lazy face."""

import ast
import errno
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sam3jax
from sam3jax import cli
from sam3jax.config import ConfigError, load_config
from sam3jax.errors import UserError, exit_status
from sam3jax.options import PARSERS, parse

ROOT = Path(__file__).parents[1]
HEAVY = ("jax", "flax", "optax", "orbax", "grain", "numpy", "PIL", "scipy", "torch", "matplotlib", "tensorboardX")  # fmt: skip
ASK = """
import contextlib, importlib, io, runpy, sys
for command, module in {doors}.items():
    for start in ("cli", "module"):
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                sys.argv = [module, "--help"]
                if start == "cli":
                    from sam3jax.cli import main
                    sys.exit(main([command, "--help"]))
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert end.code == 0, (command, start, end.code)
        assert said.getvalue().startswith("usage: "), (command, said.getvalue())
        expected = "sam3jax " + command if start == "cli" else "python -m " + module.removesuffix(".__main__")
        assert said.getvalue().startswith("usage: " + expected + " "), said.getvalue()
        found = [name for name in {heavy} if name in sys.modules]
        assert not found, (command, start, found)
"""


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_help_of_every_command_imports_nothing_heavy():
    doors = {name: module for name, (module, _) in cli.DOORS.items()}
    ended = python(ASK.format(doors=doors, heavy=HEAVY))
    assert ended.returncode == 0, ended.stderr


def test_the_package_shows_its_face_without_importing_anything_heavy():
    code = f"import sys, sam3jax, convert; dir(sam3jax), sam3jax.Config, sam3jax.load_config, sam3jax.__version__; print([n for n in {HEAVY} if n in sys.modules])"
    assert python(code).stdout.strip() == "[]"
    for name in sam3jax.__all__:
        assert getattr(sam3jax, name) is not None
        assert name in dir(sam3jax)
    assert sam3jax.load_config is load_config
    with pytest.raises(AttributeError, match="Trainer"):
        sam3jax.Trainer  # noqa: B018


@pytest.mark.parametrize("own", [True, False])
def test_compiled_programs_are_kept_for_the_next_start(tmp_path, own):
    """In the cache, or where jax is told to; a cache that cannot be written to stops nothing."""
    code = "import os; from sam3jax import cli; cli.main(['settings', 'run']); print(os.environ.get('JAX_COMPILATION_CACHE_DIR'))"

    def place(**environment):
        kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**kept, **environment}
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    if own:
        assert place(JAX_COMPILATION_CACHE_DIR="mine", SAM3JAX_CACHE=str(tmp_path)) == "mine"
        (tmp_path / "file").touch()
        assert place(SAM3JAX_CACHE=str(tmp_path / "file")) == "None"
    else:
        found = Path(place(SAM3JAX_CACHE=str(tmp_path)))
        assert found.parent == tmp_path / "programs"
        assert found.is_dir()
        assert Path(place(XDG_CACHE_HOME=str(tmp_path))).parent == tmp_path / "sam3jax" / "programs"


def test_the_version_is_that_of_the_package(capsys):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert declared["scripts"] == {"sam3jax": "sam3jax.cli:main"}
    assert sam3jax.__version__ == importlib.metadata.version("sam3jax") == declared["version"]
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sam3jax {declared['version']}\n"


def test_every_command_is_listed_and_a_wrong_one_gets_a_hint(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in cli.DOORS)
    assert PARSERS.keys() == cli.DOORS.keys() - {"convert"}
    assert cli.main([]) == 2
    assert cli.main(["tarin"]) == 2
    assert cli.main(["xyz"]) == 2
    said = capsys.readouterr().err
    assert "did you mean train?" in said
    assert "expected one of train, evaluate" in said


@pytest.mark.parametrize(
    "words",
    [
        ["train", "seed=-1"], ["train", "--config", "nowhere.yaml"], ["train", "--seed", "-1"],
        ["demo", "nonsense"], ["demo", "--config", "nowhere.yaml"],
        ["evaluate", "--run", "nowhere"], ["predict", "--run", "nowhere", "a.png", "--phrase", "cat"],
        ["doctor", "nowhere"], ["report", "nowhere"], ["settings", "nowhere"],
        ["convert", "inspect", "nowhere"], ["convert", "torch-to-jax", "--src", "nowhere", "--out", "x"],
    ],
)  # fmt: skip
def test_errors_of_the_user_are_one_sentence_and_status_2(words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    # As in the process of the command, whose devices are not yet known: here they are.
    monkeypatch.setattr(cli, "_ENVIRONMENT", {})
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["train", "--nonsense"], ["predict"], ["report"], ["convert"], ["evaluate"]])  # fmt: skip
def test_wrong_options_end_with_status_2_before_anything_heavy(words):
    code = f"import sys; from sam3jax.cli import main\ntry: main({words})\nexcept SystemExit as e: print(e.code, 'jax' in sys.modules)"
    assert python(code).stdout == "2 False\n"


def test_a_defect_keeps_its_traceback():
    for defect in (ValueError("shapes"), KeyError("x"), UnicodeDecodeError("utf-8", b"", 0, 1, ""), OSError("odd")):  # fmt: skip
        with pytest.raises(type(defect)):
            exit_status(raising(defect))


def raising(error: BaseException):
    def command():
        raise error

    return command


def test_one_rule_from_error_to_exit_status(capsys):
    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 1) == 1
    assert exit_status(raising(UserError("no such thing: make one"))) == 2
    assert capsys.readouterr().err == "error: no such thing: make one\n"
    assert exit_status(raising(PermissionError(errno.EACCES, "Permission denied", "a.json"))) == 2
    assert exit_status(raising(OSError(errno.ENOSPC, "No space left on device"))) == 2
    assert exit_status(raising(KeyboardInterrupt())) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: cannot use a.json: Permission denied; check")
    assert said[1].startswith("error: cannot use the disk: No space left on device; make room")
    assert said[2] == "stopped"


def test_a_reader_that_leaves_is_no_error():
    code = "from sam3jax.cli import main; import sys; sys.exit(main(['settings']))"
    ended = subprocess.run(f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}', shell=True,
                           executable="/bin/bash", capture_output=True, text=True, cwd=ROOT)  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")


def test_every_error_for_people_is_a_user_error():
    """So that no door forgets one: only errors.py derives from an exception of Python."""
    for file in [*ROOT.glob("sam3jax/**/*.py"), *ROOT.glob("convert/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ClassDef) or file.name == "errors.py":
                continue
            bases = {b.id for b in node.bases if isinstance(b, ast.Name)}
            assert not bases & {
                "Exception",
                "ValueError",
                "RuntimeError",
                "TypeError",
                "KeyError",
            }, f"{file.relative_to(ROOT)}: {node.name} derives from {bases}; take UserError"


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["a=1", "--config", "x", "b=2"], ["a=1", "b=2"]),
        (["--config", "x", "a=1", "b=2"], ["a=1", "b=2"]),
        (["a=1", "b=2", "--config=x"], ["a=1", "b=2"]),
        (["--steps", "100", "--config", "x"], ["steps=100"]),
        (["--config", "x", "--optim.learning_rate=1e-4", "seed=3"], ["optim.learning_rate=1e-4", "seed=3"]),
        (["--data.flip", "--config", "x"], ["data.flip=true"]),
        (["--data.flip", "false", "--config", "x"], ["data.flip=false"]),
        (["--seed", "-1", "--config", "x"], ["seed=-1"]),
        (["--config", "x", "--output=a=b"], ["output=a=b"]),
    ],
)  # fmt: skip
def test_settings_and_options_may_be_mixed(words, overrides):
    for command in ("train", "demo"):
        options = parse(command, words)
        assert (options.config, options.overrides) == ("x", overrides)


def test_a_setting_without_its_value_is_named(capsys):
    with pytest.raises(SystemExit):
        parse("train", ["--steps"])
    assert "--steps: expected a value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("train", ["--confg", "x"], "no option --confg, did you mean --config?"),
        ("train", ["--nonsense"], "no option --nonsense"),
        ("predict", ["a.png", "--run", "r", "--phrse", "cat"], "did you mean --phrase?"),
        ("predict", ["a.png", "--run", "r", "--phrase=cat", "--points=5"], "expected x,y in pixels"),
        ("predict", ["--run", "r", "--points", "5,5", "a.png"], "pictures are named before --points"),
    ],
)  # fmt: skip
def test_a_misspelt_option_is_named(command, words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(command, words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_misspelt_setting_is_named_also_where_it_is_written_as_an_option():
    with pytest.raises(ConfigError, match="unknown config key stpes, did you mean steps"):
        load_config(None, parse("train", ["--stpes", "5"]).overrides)


def test_numbers_below_zero_are_no_options():
    options = parse("predict", ["a.png", "--run", "r", "--box", "-5,10,40,30", "--points", "-1,5.5,0"])  # fmt: skip
    assert options.box == [[-5, 10, 40, 30]]
    assert options.points == [[[-1, 5.5, 0]]]


def test_predict_takes_pictures_before_and_after_its_options():
    for words in (["a.png", "--run", "r", "b.png", "--phrase", "cat"], ["--run", "r", "--phrase", "cat", "a.png", "b.png"]):  # fmt: skip
        options = parse("predict", words)
        assert (options.pictures, options.run, options.phrase) == (["a.png", "b.png"], "r", ["cat"])


def test_the_formats_of_the_doctor_are_those_that_can_be_imported():
    from sam3jax.data.importers import FORMATS
    from sam3jax.options import IMPORTS

    assert IMPORTS == FORMATS


def test_the_page_of_settings_is_what_the_command_prints(capsys):
    assert cli.main(["settings"]) == 0
    said = capsys.readouterr().out
    assert (ROOT / "docs" / "settings.md").read_text() == said, (
        "run `python -m sam3jax.settings > docs/settings.md`"
    )
    assert cli.main(["settings", "optim"]) == 0
    part = capsys.readouterr().out
    assert part.splitlines()[-1] in said
    assert "## optim" in part
    assert "## lora" not in part


@pytest.mark.parametrize("given", ["shipped:tiny_shapes", "sam3.pt"])
def test_weights_in_the_place_of_a_run_are_told_where_they_belong(given, tmp_path, monkeypatch):
    from sam3jax.weights.run_folder import open_run_base

    monkeypatch.chdir(tmp_path)
    (tmp_path / "sam3.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"{given} holds weights, .* --model, training as init="):
        open_run_base(given)
