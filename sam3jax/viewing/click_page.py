"""The page of `sam3jax app`, built with Gradio, which is imported only here."""

from __future__ import annotations

import base64
import importlib
import io
import os
from pathlib import Path
from typing import Any

from PIL import Image

from sam3jax.errors import UserError
from sam3jax.files import FileError
from sam3jax.viewing.click_session import Studio, Work

_WIDEST = 1600  # pixels of a picture in the browser; answers are as large as the picture itself
_INSIDE, _OUTSIDE = "inside", "outside"
_CSS = """
.picture img { max-width: 100%; max-height: 70vh; cursor: crosshair; display: block; user-select: none; }
.picture p { margin: 2px 0; font-weight: 600; }
footer { display: none !important; }
"""
# Gradio's own pictures know no right button, so these send where they were clicked, as shares of the picture.
_SCRIPT = """
const send = (e, outside) => {
  if (e.target.tagName !== 'IMG') return;
  e.preventDefault();
  const box = e.target.getBoundingClientRect();
  trigger('select', {x: (e.clientX - box.left) / box.width, y: (e.clientY - box.top) / box.height, outside});
};
element.addEventListener('click', e => send(e, false));
element.addEventListener('contextmenu', e => send(e, true));
"""


def gradio() -> Any:
    """The library, told to call nobody. Raises FileError where it is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise FileError(f"the page needs gradio ({error}): pip install 'sam3jax[app]'") from None


def build(studio: Studio, folder: str) -> Any:
    """The page; folder: where masks are saved until the visitor says another."""
    gr = gradio()
    names = [side.name for side in studio.sides]

    def show(work: Work, told: str) -> list[Any]:
        pictures = [
            "" if work.picture is None else _page_picture(studio.draw(work, k), names[k])
            for k in range(len(names))
        ]
        return [work, *pictures, told]

    def guarded(action: Any) -> Any:
        """Errors of the visitor become the sentence below the pictures."""

        def run(before: Work | None, *values: Any) -> list[Any]:
            work = before or Work()
            try:
                work, told = action(work, *values)
            except UserError as error:
                told = f"⚠ {error}"
            return show(work, told)

        return run

    def opened(work: Work, file: str | None) -> tuple[Work, str]:
        if not file:
            return Work(), "Open a picture."
        work = studio.open(Path(file))
        assert work.picture is not None
        width, height = work.picture.size
        return work, f"{Path(file).name}, {width} x {height} pixels. Click on an object, or type a phrase."  # fmt: skip

    def clicked(work: Work, kind: str, at: dict[str, Any]) -> tuple[Work, str]:
        if work.picture is None:
            return work, "Open a picture first."
        width, height = work.picture.size
        x, y = (
            min(max(float(at[k]), 0.0), 1.0) * n - 0.5 for k, n in (("x", width), ("y", height))
        )
        label = int(not at["outside"] and kind == _INSIDE)
        found = studio.click(work, x, y, label)
        scores = ", ".join(f"{n} {iou:.2f}" for n, iou in zip(names, found.ious, strict=True))
        return work, f"Click {len(work.rounds)}; predicted IoU: {scores}."

    def found(work: Work, phrase: str) -> tuple[Work, str]:
        counts = studio.find(work, phrase)
        told = ", ".join(f"{n} {count}" for n, count in zip(names, counts, strict=True))
        return work, f"“{phrase}”: {told} found."

    def undone(work: Work) -> tuple[Work, str]:
        if work.rounds:
            work.rounds.pop()
        elif any(work.done):
            work.done = [done[:-1] for done in work.done]
        return work, f"{len(work.rounds)} clicks on this object."

    def finished(work: Work) -> tuple[Work, str]:
        studio.finish(work)
        return work, "Click on the next object."

    def cleared(work: Work) -> tuple[Work, str]:
        work.rounds, work.done = [], [[] for _ in names]
        return work, "Nothing is marked."

    def saved(work: Work, phrase: str, place: str) -> tuple[Work, str]:
        if not place.strip():
            raise FileError("no folder to save to: name the training set")
        file, new = studio.save(work, place.strip(), phrase)
        return work, f"{new} new masks of “{phrase.strip()}” in {file}."

    def picture_of_side(k: int) -> Any:
        return gr.HTML(
            elem_id=f"side{k}", elem_classes=["picture"], js_on_load=_SCRIPT, min_width=280
        )

    with gr.Blocks(title="sam3jax", analytics_enabled=False) as page:
        work = gr.State(None)
        with gr.Row():
            file = gr.File(
                label="Picture", type="filepath", height=90, elem_id="file", min_width=280
            )
            phrase = gr.Textbox(
                label="Phrase", placeholder="red circle", info="what to find, and the name of what is saved",
                elem_id="phrase", min_width=280,
            )  # fmt: skip
        with gr.Row():
            kind = gr.Radio(
                [_INSIDE, _OUTSIDE], value=_INSIDE, label="A click is", elem_id="kind",
                info="the right button is always outside",
            )  # fmt: skip
        with gr.Row():
            find = gr.Button("Find", elem_id="find", min_width=70)
            undo = gr.Button("Undo", elem_id="undo", min_width=70)
            more = gr.Button("Next", elem_id="next", min_width=70)
            clear = gr.Button("Clear", elem_id="clear", min_width=70)
        with gr.Row():
            pictures = [picture_of_side(k) for k in range(len(names))]
        told = gr.Markdown("Open a picture.", elem_id="told")
        with gr.Row():
            place = gr.Textbox(
                value=folder, label="Training set", info="a COCO folder; made if it is not there",
                elem_id="place", scale=3, min_width=280,
            )  # fmt: skip
            save = gr.Button("Save masks", variant="primary", elem_id="save", min_width=120)
        shown = [work, *pictures, told]

        file.change(guarded(opened), [work, file], shown)
        phrase.submit(guarded(found), [work, phrase], shown)
        find.click(guarded(found), [work, phrase], shown)
        undo.click(guarded(undone), [work], shown)
        more.click(guarded(finished), [work], shown)
        clear.click(guarded(cleared), [work], shown)
        save.click(guarded(saved), [work, phrase, place], shown)

        def at(work: Work, kind: str, event: Any) -> list[Any]:
            return guarded(clicked)(work, kind, event._data)

        at.__annotations__["event"] = gr.EventData  # by this Gradio knows that it wants the event
        for picture in pictures:
            picture.select(at, [work, kind], shown)
    return page


def launch(page: Any, *, host: str, port: int | None, wait: bool = True) -> str:
    """Serve the page; its address. Returns at once where it shall not wait."""
    theme = gradio().themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, url, _ = page.launch(
        server_name=host, server_port=port, share=False, quiet=True, theme=theme, css=_CSS,
        prevent_thread_lock=True, show_error=True,
    )  # fmt: skip
    print(f"click at {url} (Ctrl-C ends it)", flush=True)
    if wait:
        page.block_thread()
    return url


def _page_picture(picture: Image.Image, name: str) -> str:
    shown = picture.copy()
    shown.thumbnail((_WIDEST, _WIDEST))
    held = io.BytesIO()
    shown.save(held, "PNG" if max(shown.size) <= 512 else "JPEG", quality=90)
    kind = "png" if max(shown.size) <= 512 else "jpeg"
    data = base64.b64encode(held.getvalue()).decode("ascii")
    return (
        f'<p>{name}</p><img draggable="false" alt="{name}" src="data:image/{kind};base64,{data}">'
    )
