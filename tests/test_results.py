"""Nothing of the user's is overwritten, and wrong questions are refused before a model is read."""

from __future__ import annotations

import pytest
from PIL import Image

from sam3jax import files, predict
from sam3jax.errors import plain
from sam3jax.files import FileError, write_json
from sam3jax.viewing.results import check_results, info


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.jpg", "C.PNG"):
        Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder


def ask(capsys, *words):
    """(status, what was said) of predict with a model that is not there: nothing may be read before."""
    try:
        status = predict.main([*map(str, words)])
    except SystemExit as refused:  # by the parser
        status = refused.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize("inside", [False, True])
def test_pictures_are_never_replaced_by_their_overlays(inside, photos, monkeypatch, capsys):
    before = {f.name: f.read_bytes() for f in photos.iterdir()}
    where, output = (photos, photos)
    if inside:
        monkeypatch.chdir(photos)
        where, output = "*.*", "."
    status, said = ask(capsys, where, "--model", "none", "--phrase", "cup", "--output", output)
    assert status == 2
    assert "is one of the inputs and would be replaced" in said
    assert {f.name: f.read_bytes() for f in photos.iterdir()} == before


def test_a_file_of_the_users_is_not_replaced_but_results_are(tmp_path):
    (tmp_path / "x.png").write_text("mine")
    with pytest.raises(FileError, match=r"x\.png was there before"):
        check_results(tmp_path, ["X.png"], [])
    check_results(tmp_path, ["y.png"], [])
    write_json(tmp_path / "predictions.json", {"info": info(["x.png"])})
    check_results(tmp_path, ["x.png"], [])
    with pytest.raises(FileError, match="one of the inputs"):
        check_results(tmp_path, ["x.png"], [tmp_path / "x.png"])
    write_json(tmp_path / "predictions.json", [])
    with pytest.raises(FileError, match=r"predictions\.json was there before"):
        check_results(tmp_path, [], [])


def test_a_run_folder_is_no_place_for_predictions(photos, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("steps: 1\n")
    status, said = ask(capsys, photos, "--run", run, "--phrase", "cup", "--output", run)
    assert status == 2
    assert "is a run folder" in said
    assert [f.name for f in run.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--phrase", "red cup", "--phrase", "red cup"), "is the same to the model as"),
        (("--phrase", "red cup", "--phrase", "Red  cup"), "is the same to the model as"),
        (("--phrase", "cup", "--base"), "--base is the model that a run started from"),
        (("--phrase", "red\ncup"), "one line without control characters"),
        (("--phrase", "a", "--threshold", "2"), "expected a score from 0 to 1"),
        (("--phrase", "a", "--threshold", "-0.1"), "expected a score from 0 to 1"),
        (("--phrase", "a", "--threshold", "nan"), "expected a score from 0 to 1"),
    ],
)
def test_wrong_questions_are_refused_before_a_model_is_read(words, said, photos, tmp_path, capsys):
    status, found = ask(capsys, photos, "--model", "none", "--output", tmp_path / "o", *words)
    assert status == 2
    assert said in found
    assert not (tmp_path / "o").exists()


def test_names_move_no_cursor():
    assert plain("a\x1b[2Jb\nc é 杯") == "a\\x1b[2Jb\\nc é 杯"


def test_a_folder_without_the_right_to_write_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(FileError, match="Permission denied; give another folder"):
        files.make_folder(tmp_path / "results")
