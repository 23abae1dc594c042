"""What a run says in a terminal while something takes long."""

import io
import time

from sam3jax.config import parse_config
from sam3jax.training.log import RunLog


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_counts_what_is_validated(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    log = RunLog(tmp_path, 0, parse_config({"steps": 7}))
    with log.busy("validating") as advance:
        for done in range(1, 4):
            advance(done, 5)
        time.sleep(0.6)  # it is drawn twice a second
        log.close()
    last = terminal.getvalue().rsplit("step 0/7", 1)[-1]
    assert "validating 3/5: " in last


def test_a_step_that_compiles_nothing_is_not_named(tmp_path, capsys):
    log = RunLog(tmp_path, 0, parse_config({"steps": 7}))
    with log.busy("compiling", when=False) as advance:
        advance(1, 2)
    log.close()
    assert "compiling" not in capsys.readouterr().err
