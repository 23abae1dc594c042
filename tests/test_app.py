"""A page to click in: what it saves is read by the next training and replaces nothing; a real browser clicks."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from sam3jax import app
from sam3jax.data.collecting import add_to_set
from sam3jax.data.folders import read_dataset
from sam3jax.data.pictures import DEFAULT, DataError
from sam3jax.data.records import decode_mask
from sam3jax.viewing import click_page
from sam3jax.viewing.click_session import Side, Studio, Work
from sam3jax.viewing.predictor import PromptError
from tests.coco_folders import annotation, write

SIZE = (60, 40)


def a_mask(left=5, top=6):
    mask = np.zeros(SIZE[::-1], bool)
    mask[top : top + 9, left : left + 12] = True
    return mask


@pytest.fixture
def picture(tmp_path):
    """Of 16 bits, which stay."""
    file = tmp_path / "mine.PNG"
    values = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 20
    Image.fromarray(values).save(file)
    return file


def test_masks_are_added_to_a_set_that_keeps_what_it_had(tmp_path, picture):
    items = [annotation(7, 0, 1, (3, 4, 8, 9)), annotation("x", 1, 2, (3, 4, 8, 9))]
    folder = write(tmp_path / "d", items, images=2)
    before = read_dataset(folder)
    (file,) = folder.rglob("*.json")
    was = file.read_bytes()
    held = {f: f.read_bytes() for f in folder.rglob("*.*") if f.is_file() and f != file}
    category = json.loads(was)["categories"][0]["name"]

    assert add_to_set(folder, picture, SIZE, category.upper(), [a_mask()]) == (file, 1)
    assert add_to_set(folder, picture, SIZE, "lung", [a_mask(), a_mask(20)]) == (file, 2)
    assert add_to_set(folder, picture, SIZE, "lung", [a_mask(20)]) == (file, 0)

    assert all(f.read_bytes() == content for f, content in held.items())
    assert file.with_name(file.name + ".before_clicks").read_bytes() == was
    after = read_dataset(folder)
    assert len(after.images) == len(before.images) + 1
    own = next(r for r in after.images if r.file.name.startswith("clicked-"))
    assert own.file.read_bytes() == picture.read_bytes()
    assert [after.categories[a.category_id] for a in own.annotations] == [category, "lung", "lung"]
    kept = json.loads(file.read_text())
    assert kept["annotations"][:2] == json.loads(was)["annotations"]


def test_a_new_set_is_made_and_writers_take_turns(tmp_path, picture):
    folder = tmp_path / "new"
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(add_to_set, folder, picture, SIZE, "cell", [a_mask(k)]) for k in range(8)
        ]
    assert [f.result()[1] for f in asked] == [1] * 8
    (record,) = read_dataset(folder).images
    assert len(record.annotations) == 8
    assert len({a.id for a in record.annotations}) == 8


@pytest.mark.parametrize(
    ("phrase", "masks", "words"),
    [(" ", [a_mask()], "no name"), ("a", [], "no mask"), ("a", [a_mask() & False], "no mask"),
     ("a", [a_mask()[:9]], "the mask is 60 x 9")],
)  # fmt: skip
def test_what_cannot_be_saved_is_named_and_nothing_is_left(tmp_path, picture, phrase, masks, words):
    with pytest.raises(DataError, match=words):
        add_to_set(tmp_path / "new", picture, SIZE, phrase, masks)
    assert not list((tmp_path / "new").rglob("*.json"))


class Clicks:
    """Answers with a square around the last click inside."""

    reading = DEFAULT

    def set_image(self, picture):
        self.picture = picture

    def predict(self, points, labels, mask=None, multimask=True):
        self.shown, self.asked = mask, (points, labels, multimask)
        x, y = (int(v) for v in [p for p, k in zip(points, labels) if k][-1])
        masks = np.zeros((1, 3 if multimask else 1, *SIZE[::-1]), bool)
        masks[0, -1, y - 3 : y + 4, x - 3 : x + 4] = True
        ious = np.arange(masks.shape[1], dtype=float)[None]
        return type("Answer", (), dict(masks=masks, ious=ious, logits=masks[..., ::2, ::2] * 1.0))


def test_clicks_go_back_with_the_last_mask_and_can_be_taken_back(picture, tmp_path):
    side = Side("model", Clicks())
    studio = Studio([side])
    with pytest.raises(PromptError, match="no picture yet"):
        studio.click(Work(), 5, 5, 1)
    work = studio.open(picture)
    with pytest.raises(PromptError, match="begin with one inside"):
        studio.click(work, 20, 20, 0)
    studio.click(work, 20, 20, 1)
    assert side.model.asked[2]
    assert side.model.shown is None
    studio.click(work, 30, 25, 0)
    assert side.model.asked == ([(20, 20), (30, 25)], [1, 0], False)
    np.testing.assert_array_equal(side.model.shown, work.rounds[0].logits[0])
    work.rounds.pop()
    studio.finish(work)
    studio.click(work, 40, 30, 1)
    assert [int(m.sum()) for m in work.masks(0)] == [49, 49]
    assert studio.draw(work, 0).size == (480, 320)
    _, new = studio.save(work, tmp_path / "set", "cell")
    assert new == 2
    assert len(read_dataset(tmp_path / "set").images[0].annotations) == 2


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(click_page.importlib, "import_module", absent)
    assert app.main([]) == 2
    assert "pip install 'sam3jax[app]'" in capsys.readouterr().err


def test_a_browser_clicks_sees_a_mask_and_saves_it(tmp_path):
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    picture = tmp_path / "disc.png"
    y, x = np.mgrid[:200, :200]
    disc = np.hypot(x - 80, y - 110) < 40
    Image.fromarray(np.where(disc[..., None], [220, 30, 30], 235).astype(np.uint8)).save(picture)
    page = click_page.build(Studio(app.sides(None)), str(tmp_path / "set"))
    url = click_page.launch(page, host="127.0.0.1", port=None, wait=False)
    try:
        with api.sync_playwright() as playing:
            shown = playing.chromium.launch(
                executable_path=browser, args=["--no-sandbox"]
            ).new_page()
            outside = []
            shown.on("request", lambda r: outside.append(r.url) if r.url.startswith("http") and "127.0.0.1" not in r.url else None)  # fmt: skip
            shown.goto(url)
            shown.set_input_files("#file input[type=file]", picture)
            shown.wait_for_selector("#side0 img")
            told = lambda words: shown.wait_for_selector(f"#told :text('{words}')", timeout=120_000)
            box = shown.locator("#side0 img").bounding_box()
            at = lambda x, y: {"x": (x + 0.5) / 200 * box["width"], "y": (y + 0.5) / 200 * box["height"]}  # fmt: skip
            shown.locator("#side0 img").click(position=at(80, 110))
            told("Click 1")
            shown.locator("#side0 img").click(position=at(180, 20), button="right")
            told("Click 2")
            shown.fill("#phrase input, #phrase textarea", "red circle")
            shown.click("#save")
            told("1 new masks")
            assert not outside, "the page asks nobody but its own server"
    finally:
        page.close()
    (record,) = read_dataset(tmp_path / "set").images
    mask = decode_mask(record.annotations[0], 200, 200)
    assert (mask & disc).sum() / (mask | disc).sum() > 0.7
