"""The table of docs/memory.md: rows are compiled once, and what is said to fit does."""

import json

import pytest

from sam3jax.training import plan, targets
from scripts import plan_table
from scripts.plan_table import ALL, EVERYWHERE, Row


def needs(gigabytes):
    return plan.Needs(int(1e9), int((gigabytes - 1) * 1e9), 1e12, {}, (), 60.0, 5, 1)


def test_rows_are_compiled_once_and_a_cut_off_run_goes_on(monkeypatch, tmp_path):
    asked, file = [], tmp_path / "rows.jsonl"
    monkeypatch.setattr(targets, "target", lambda name: (None, [name]))
    monkeypatch.setattr(plan_table.jax, "clear_caches", lambda: None)

    def compiled(config, devices):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append((devices[0], config.batch_size, config.loss.masks, config.train))
        return needs(3)

    monkeypatch.setattr(plan, "needs", compiled)
    wanted = [Row("h100", EVERYWHERE, 1, True), Row("t4", ALL, 4, True), Row("v5e", EVERYWHERE, 4, False)]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        plan_table.compile_rows(wanted, 10, file)
    assert asked == [("h100", 1, True, "lora"), ("t4", 4, True, "all")]
    monkeypatch.setattr(plan, "needs", lambda config, devices: asked.append(devices[0]) or needs(4))
    plan_table.compile_rows(wanted, 10, file)
    assert asked[2:] == ["v5e"]
    assert list(plan_table.stored(file)) == wanted
    plan_table.compile_rows([Row("l4", ALL, 1, True)], 0, file)  # no time is left
    assert asked[2:] == ["v5e"]


def row(target, trained, pictures, gigabytes, masks=True):
    key = Row(target, trained, pictures, masks)
    return key, {**key._asdict(), "arguments": 1e9, "temporaries": (gigabytes - 1) * 1e9}


def test_what_fits_is_said_with_the_margin_of_the_plan():
    # Of a T4's 15.78 GB, 92 % are 14.52; of an RTX 3060's 12.46, 11.46.
    rows = [row("h100", EVERYWHERE, 1, 11.4), row("h100", EVERYWHERE, 4, 11.5), row("t4", EVERYWHERE, 1, 14.6), row("h100", ALL, 1, 70)]  # fmt: skip
    lines = plan_table.table(dict(rows))
    twelve, sixteen = lines[0], lines[1]
    assert "RTX 3060 12 GB" in twelve
    assert "LoRA r16 everywhere (1 picture at once); not all parameters" in twelve
    assert "not LoRA r16 everywhere" in sixteen
    body = [line for line in lines if line.startswith("| LoRA")]
    assert body[0].endswith("| RTX 3060 12, L4 24, RTX 4090 24, A100 40, A100 80, H100 80 |")
    assert body[1].endswith("| L4 24, RTX 4090 24, A100 40, A100 80, H100 80 |")
    assert "14.6 = 1.0 + 13.6" in body[0]
    (full,) = (line for line in lines if line.startswith("| all"))
    assert full.endswith("| - | - | A100 80, H100 80 |")
    assert "32 of 36" in lines[-1]


def test_the_page_holds_the_table_of_the_stored_rows():
    text = plan_table.PAGE.read_text()
    between = text.partition(plan_table.START)[2].partition(plan_table.END)[0]
    assert between.strip().splitlines() == plan_table.table(plan_table.stored())
    for line in plan_table.STORE.read_text().splitlines():
        assert json.loads(line)["host"] == []  # no step talks to the host


def test_every_row_is_a_run():
    rows = list(plan_table.rows())
    assert len(set(rows)) == len(rows)
    assert len([r for r in rows if r.target in plan_table.STANDS_FOR]) == 36
    small = plan_table.config_of(Row("t4", ALL, 4, False))
    assert (small.train, small.batch_size, small.loss.masks) == ("all", 4, False)
