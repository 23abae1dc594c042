"""The report: one file, no network, complete, readable on narrow and wide windows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sam3jax.data.folders import read_dataset
from sam3jax.data.pictures import DataError
from sam3jax.report import main
from sam3jax.viewing import report
from tests.report_case import write_run

NAMES = ["red circle", "<b>odd & bold</b>", "a category of a very long name that has to fit"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    for split in ("train", "valid"):
        (root / "data" / split).mkdir(parents=True)
        images, annotations = [], []
        for k in range(6):
            coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
            name = f"picture {k} & co.png"
            coarse.resize((320, 240), Image.Resampling.BICUBIC).save(root / "data" / split / name)
            images.append({"id": k, "file_name": name, "width": 320, "height": 240})
            for category in range(3):
                x, y = (float(v) for v in rng.uniform(0, 180, 2))
                corners = [[x, y, x + 60, y, x + 60, y + 50, x, y + 50]]
                annotations.append(
                    {"id": len(annotations), "image_id": k, "category_id": category, "area": 3000,
                     "bbox": [x, y, 60, 50], "segmentation": corners, "iscrowd": 0}
                )  # fmt: skip
        raw = {"images": images, "annotations": annotations}
        raw["categories"] = [{"id": i, "name": n} for i, n in enumerate(NAMES)]
        (root / "data" / split / "_annotations.coco.json").write_text(json.dumps(raw))
    folder = root / "my run"
    write_run(folder, root / "data", read_dataset(root / "data", "valid"))
    report.write_report(folder)
    return folder


class Page(HTMLParser):
    """Collects tags, links and text; complains about tags that are not closed."""

    void = ("meta", "img", "br", "path", "use", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.void:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self._open.pop()

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_is_whole_and_needs_no_other_file(run):
    html = (run / "report.html").read_text()
    page = Page(html)
    assert all(link.startswith(("#", "data:image/")) for link in page.links)
    assert "script" not in page.tags
    assert not re.search(r"url\((?!#)|@import", html)
    text = " ".join(page.words)
    for expected in (*NAMES, "my run", "step 2000", "loss/final", "rate", "segm/AP50", "Worst",
                     "Where base and tuned differ most", "picture 3 & co.png", "learning_rate",
                     "1,234,567", "instances"):  # fmt: skip
        assert expected in text, expected
    assert page.tags.count("img") >= 3 * 6
    assert page.tags.count("svg") >= 7
    assert "b" not in [t for t in page.tags if t == "odd"]
    assert "<b>odd" not in html


def test_numbers_are_those_of_the_evaluation(run):
    found = json.loads((run / "evaluation.json").read_text())
    html = (run / "report.html").read_text()
    ap, base = found["metrics"]["segm/AP"], found["base"]["metrics"]["segm/AP"]
    assert ap > base
    row = re.search(r"<tr><td>segm/AP</td>(.*?)</tr>", html)[1]
    values = re.findall(r">([+-]?\d*\.\d+)\b(?! to)", row)
    assert values == [f"{base:.3f}", f"{ap:.3f}", f"{ap - base:+.3f}"]
    # How far each could be off, had other pictures been drawn.
    ranges = found["uncertainty"]["segm/AP"], found["compare"]["uncertainty"]["segm/AP"]
    drawn = re.findall(r"([+-]?[\d.]+) to ([+-]?[\d.]+)</small>", row)
    assert drawn == [tuple(f"{v:.3f}" for v in ranges[0]), tuple(f"{v:+.3f}" for v in ranges[1])]
    assert ranges[0][0] < ap < ranges[0][1]


def test_curves_survive_repeats_gaps_and_a_line_cut_off(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "split": "train", "loss": 5.0, "loss/final/bbox": None},
             {"step": 2, "split": "train", "loss": float("nan")},
             {"step": 3, "split": "train", "loss": 4.0, "note": "text"},
             {"step": 3, "split": "train", "loss": 3.0},
             {"step": 3, "split": "valid", "segm/AP": 0.5, "cgF1": 0.25}]  # fmt: skip
    file.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 4, "lo')
    charts = report.read_curves(file)
    assert charts["loss"]["loss"] == [(1, 5.0), (3, 3.0)]
    assert charts["segm"]["AP"] == [(3, 0.5)]
    assert charts["concept"]["cgF1"] == [(3, 0.25)]
    assert next(iter(charts)) == "segm"
    assert report._place("loss_ce_aux_10_o2m") == ("loss_ce", "aux 10 o2m")
    assert report._place("loss_ce") == ("loss_ce", "loss_ce")
    assert report._place("segm/AP_small") == ("segm by size", "AP_small")
    assert report._place("loss/o2m/ce") == ("loss/o2m", "ce")
    assert report.read_curves(tmp_path / "absent") == {}
    file.write_text("\n".join(json.dumps({"step": k, "loss": k}) for k in range(5001)))
    points = report.read_curves(file)["loss"]["loss"]
    assert len(points) <= 402
    assert points[0] == (0, 0)
    assert points[-1] == (5000, 5000)


def test_a_bare_run_and_moved_data_still_give_a_report(run, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").touch()
    Page(report.write_report(tmp_path / "bare").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("/data", "/elsewhere"))
    html = report.write_report(copy).read_text()
    assert "cannot be read any more" in html
    assert "segm/AP" in html


def test_what_is_no_run_folder_is_one_sentence(tmp_path, capsys):
    with pytest.raises(DataError, match="no run folder"):
        report.write_report(tmp_path / "nowhere")
    (tmp_path / "photographs").mkdir()
    for name in ("nowhere", "photographs"):
        assert main([str(tmp_path / name)]) == 2
        assert "no run folder" in capsys.readouterr().err
    assert not list((tmp_path / "photographs").iterdir())


@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_shows_it_without_sideways_scrolling(run, tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    probe = """<script>addEventListener("load", () => { document.title =
        [document.documentElement.scrollWidth, innerWidth,
         [...document.images].every(i => i.naturalWidth > 0),
         Math.min(...[...document.querySelectorAll(".chart")].map(c => c.clientWidth))].join() })
      </script></body>"""
    file = tmp_path / "probe.html"
    html = (run / "report.html").read_text().replace('loading="lazy"', "")
    html, policies = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    assert policies == 1, "the page allows no script, not even the probe's"
    file.write_text(html.replace("</body>", probe))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-rules=MAP * 0.0.0.0",
               f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900",
               "--virtual-time-budget=20000", "--dump-dom", file.as_uri()]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search(r"<title>(.*?)</title>", page)[1]
    content, window, decoded, chart = title.split(",")
    assert int(content) <= int(window)
    assert decoded == "true"
    assert int(chart) >= 300


def test_nothing_in_the_files_of_a_run_can_act_in_its_report(run, tmp_path):
    """Names of metrics, the step and the weights come from files, which anybody may have written."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = copy / "evaluation.json"
    content = json.loads(file.read_text())
    evil = "<img src=x onerror=document.title=1>"
    content["metrics"][evil], content["weights"], content["step"] = 0.5, evil, evil
    content["data"] = f"{evil} of /home/maker/private/data:valid"
    file.write_text(json.dumps(content))
    (copy / "config.yaml").write_text("init: /home/maker/models/sam3\noutput: /home/maker/runs/a\n")
    html = report.write_report(copy, {}).read_text()
    assert evil not in html
    assert "&lt;img src=x onerror" in html
    assert "default-src &#39;none&#39;; img-src data:" in html
    assert "/home/maker" not in html
    assert "init: …/sam3" in html
