"""The command line: what it prints, what it exits with, and that nothing hostile gets through."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gockpt
from gockpt.cli.output import byte_size, printable
from gockpt.cli.run import run

pytestmark = pytest.mark.usefixtures("directories")
EVIL = "\x1b[31mred\x07\u202egnp.exe\u2028[bold]x\\"


def fill(path="ckpts", steps=(1, 2, 3, 4), *, compression=None, **extra):
    """Save some steps, each with its own weights."""
    model = torch.nn.Linear(3, 2)
    options = gockpt.Options(window=1, compression=compression)
    with gockpt.Checkpointer(model, None, path, options=options) as saver:
        for step in steps:
            torch.nn.init.constant_(model.weight, step)
            torch.nn.init.constant_(model.bias, 0)
            saver.after_step(step, {"loss": 1 / step, **extra}).result()


@pytest.fixture
def call(capsys):
    """Run a command; returns its exit code, standard output and standard error."""

    def call(*arguments):
        code = run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def ask(call):
    """Run a command with --json; returns its exit code and the one document."""

    def ask(*arguments):
        code, out, _ = call(*arguments, "--json")
        assert out.isascii()
        return code, json.loads(out)

    return ask


def flip(path):
    data = bytearray(Path(path).read_bytes())
    data[3] ^= 1
    Path(path).write_bytes(data)


def test_ls(call, ask):
    fill(steps=(5, 3, 3))
    code, out, _ = call("ls", "ckpts")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [["step", "seq"], ["5", "1"], ["3", "3"]]
    assert "loss=0.333333" in out
    code, document = ask("ls", "ckpts", "--all")
    assert (code, document["path"]) == (0, "ckpts")
    assert [(one["step"], one["seq"], one["superseded"]) for one in document["checkpoints"]] == [
        (5, 1, False),
        (3, 2, True),
        (3, 3, False),
    ]
    first = document["checkpoints"][0]
    assert set(first) == {
        *("step", "seq", "attempt", "path", "created", "nbytes", "exact", "metrics", "run"),
        *("superseded", "finite"),
    }
    assert first["metrics"] == {"loss": 0.2}
    assert first["nbytes"] == sum(array.nbytes for array in gockpt.open("ckpts", 5).values())


def test_show(call, ask):
    fill()
    code, out, _ = call("show", "ckpts", "--step", 2, "--tensors")
    assert code == 0
    assert re.search(r"^step +2$", out, re.MULTILINE)
    assert re.search(r"^model/weight +2x3 +float32 +24 B *$", out, re.MULTILINE)
    code, document = ask("show", "ckpts", "--tensors")
    assert (code, document["step"], document["exact"], document["extras"]) == (0, 4, True, ["loss"])
    assert {"name": "model/weight", "shape": [2, 3], "dtype": "float32", "nbytes": 24} in document["tensors"]
    assert "tensors" not in ask("show", "ckpts/step-0000000001")[1]


def test_show_and_ls_say_that_one_is_not_exact(call, ask):
    model = torch.nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(model.parameters())
    options = gockpt.Options(window=3, grad_dtype="fp16")
    with gockpt.Checkpointer(model, optimizer, "ckpts", every=6, options=options) as saver:
        for step in range(1, 7):
            model.zero_grad()
            model(torch.randn(4, 30)).square().mean().backward()
            optimizer.step()
            saver.after_step(step)
        saved = saver.handle.result()
    assert not saved.exact
    _, out, _ = call("show", "ckpts")
    assert re.search(r"^exact +no: gradients in fp16; \d tensors off, by up to ", out, re.MULTILINE)
    _, document = ask("show", "ckpts")
    assert document["exact"] is False
    assert document["deviation"]["max_abs"] == saved.deviation.max_abs
    assert set(document["inexact"]) <= set(gockpt.open("ckpts"))
    assert re.search(r" no +/?.*step-0000000006", call("ls", "ckpts")[1])


def test_pack_and_unpack(call, ask):
    fill()
    code, out, _ = call("pack", "ckpts", "a.zip", "--step", 2)
    assert (code, out) == (0, "a.zip: step 2, 32 B\n")
    code, document = ask("unpack", "a.zip", "step-0000000002")
    assert (code, document["path"], document["written"]["step"]) == (0, "a.zip", 2)
    assert document["written"]["path"] == "step-0000000002"
    for form in ("a.zip", "step-0000000002"):
        assert call("verify", form)[0] == 0
        assert call("diff", form, "ckpts", "--step-b", 2)[0] == 0
        assert ask("show", form)[1]["step"] == 2
        assert ask("ls", form)[1]["checkpoints"][0]["seq"] == 2
        code, _, err = call("prune", form, "--keep", 1)
        assert (code, "is the checkpoint of step 2 itself" in err) == (3, True)
    assert call("pack", "ckpts", "a.zip")[0] == 2
    assert call("pack", "nowhere", "b.zip")[0] == 3
    assert call("unpack", "ckpts", "nowhere/b")[0] == 4
    data = bytearray(Path("a.zip").read_bytes())
    data[200] ^= 1
    Path("a.zip").write_bytes(data)
    assert call("unpack", "a.zip", "c")[0] == 1
    assert not Path("c").exists()


def test_a_path_of_archives_is_pruned_in_a_dry_run(call, ask):
    fill("made")
    Path("ckpts").mkdir()
    for step in (1, 2, 3, 4):
        assert call("pack", "made", f"ckpts/step-{step:010}.zip", "--step", step)[0] == 0
    code, document = ask("prune", "ckpts", "--keep", 2, "--dry-run")
    assert (code, [one["step"] for one in document["removed"]]) == (0, [1, 2])
    assert [one["step"] for one in document["kept"]] == [3, 4]
    assert gockpt.steps("ckpts") == [1, 2, 3, 4]


def test_verify(call, ask):
    fill()
    code, out, _ = call("verify", "ckpts")
    assert (code, out.count("ok")) == (0, 1)
    flip("ckpts/step-0000000002/model/weight/c.0.0")
    assert ask("verify", "ckpts")[0] == 0
    code, document = ask("verify", "ckpts", "--all")
    assert (code, document["ok"]) == (1, False)
    assert [(one["step"], one["ok"]) for one in document["checkpoints"]] == [
        *((1, True), (2, False), (3, True), (4, True))
    ]
    (problem, *_) = document["checkpoints"][1]["problems"]
    assert (problem["path"], problem["array"]) == ("model/weight/c.0.0", "model/weight")
    code, out, _ = call("verify", "ckpts", "--step", 2)
    assert code == 1
    assert "model/weight/c.0.0" in out


FILES = (
    "model/weight/c.0.0",
    "model/bias/c.0",
    "model/weight/zarr.json",
    "model/bias/zarr.json",
    "zarr.json",
    "state.json",
)


def test_countless_problems_are_cut_short_and_counted(call, ask, monkeypatch):
    fill(steps=(1, 2))
    for name in range(12):
        Path(f"ckpts/step-0000000002/stray-{name:02}").touch()
    code, document = ask("verify", "ckpts")
    one = document["checkpoints"][0]
    assert (code, one["problems"], len(one["foreign"]), one["more_foreign"]) == (0, [], 12, 0)
    code, out, _ = call("verify", "ckpts")
    assert (code, out.count("stray"), out.count("of another program")) == (0, 12, 12)
    for name in FILES:
        flip(f"ckpts/step-0000000002/{name}")
    code, document = ask("verify", "ckpts")
    one = document["checkpoints"][0]
    assert (code, len(one["problems"]), one["more"], one["truncated"]) == (1, 6, 0, False)
    flip("ckpts/step-0000000001/gockpt.json")
    monkeypatch.setattr("gockpt.storage.read.verify.MAX_PROBLEMS", 5)
    monkeypatch.setattr("gockpt.catalog.MAX_PROBLEMS", 5)
    code, document = ask("verify", "ckpts")
    one = document["checkpoints"][0]
    assert (code, len(one["problems"]), one["more"], one["truncated"]) == (1, 5, 2, True)
    code, out, _ = call("verify", "ckpts")
    assert (code, ": 7 problems" in out, out.count("stray")) == (1, True, 5)
    assert "\n  and 2 more\n" in out
    assert out.endswith("  and 7 more of other programs\n")


def test_a_damaged_manifest_is_found(call):
    fill()
    flip("ckpts/step-0000000003/gockpt.json")
    for arguments in (("--step", 3), ("--all",), ()):
        code, out, _ = call("verify", "ckpts", *arguments)
        assert (code, "gockpt.json" in out) == (1, True)
    assert call("show", "ckpts", "--step", 3)[0] == 1


def test_diff(call, ask):
    fill("a", steps=(1, 2))
    fill("b", steps=(2,))
    code, document = ask("diff", "a", "b", "--step-a", 1)
    assert (code, document["same_tensors"], document["step"]) == (1, False, {"a": 1, "b": 2})
    (weight,) = [one for one in document["changed"] if one["name"] == "model/weight"]
    assert (weight["elements"], weight["max_abs_difference"], weight["not_finite"]) == (6, 1.0, 0)
    assert {"where": "state.json/extra/loss", "a": 1.0, "b": 0.5} in document["metadata"]
    code, out, _ = call("diff", "a", "b", "--step-a", 1, "--quick")
    assert code == 1
    assert re.search(r"^model/weight +float32\[2, 3\] +6 +1 *$", out, re.MULTILINE)
    code, document = ask("diff", "a", "a")
    assert (code, document["equal"], document["changed"], document["metadata"]) == (0, True, [], [])


@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_a_compressed_one_is_compared_by_what_it_holds(quick, ask):
    fill("raw", steps=(2,))
    fill("small", steps=(2, 3), compression="zstd")
    assert ask("diff", "raw", "small", "--step-b", 2, *quick)[1]["same_tensors"]
    assert ask("diff", "small", "small", *quick)[0] == 0
    changed = ask("diff", "raw", "small", *quick)[1]["changed"]
    assert [one["name"] for one in changed] == ["model/weight"]


def test_prune(call, ask):
    fill(steps=(10, 20, 30, 40, 50))
    code, document = ask(
        "prune", "ckpts", "--keep", 2, "--every", 30, "--best", 1, "--metric", "loss", "--dry-run"
    )
    assert (code, document["dry_run"], [one["step"] for one in document["removed"]]) == (0, True, [10, 20])
    assert gockpt.steps("ckpts") == [10, 20, 30, 40, 50]
    code, out, _ = call("prune", "ckpts", "--keep", 2, "--every", 30)
    assert (code, out.count("removed")) == (0, 2)
    assert gockpt.steps("ckpts") == [30, 40, 50]
    code, document = ask("prune", "ckpts", "--keep", 1, "--best", 1, "--metric", "loss", "--mode", "max")
    assert [one["step"] for one in document["kept"]] == [30, 50]


def test_prune_while_a_run_saves_there_is_refused(call, ask):
    model = torch.nn.Linear(2, 2)
    with gockpt.Checkpointer(model, None, "ckpts") as saver:
        for step in (1, 2, 3):
            saver.after_step(step).result()
        assert ask("prune", "ckpts", "--keep", 2, "--dry-run")[0] == 0
        code, document = ask("prune", "ckpts", "--keep", 2)
        assert (code, document["error"]["kind"]) == (4, "PathBusy")
    assert gockpt.steps("ckpts") == [1, 2, 3]


def test_only_the_newest_stays_only_if_it_is_whole(call):
    fill()
    flip("ckpts/step-0000000004/model/bias/c.0")
    code, _, err = call("prune", "ckpts", "--keep", 1)
    assert (code, "Nothing was removed" in err) == (1, True)
    assert gockpt.steps("ckpts") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["ls", "nowhere"], 3),
        (["show", "nowhere"], 3),
        (["verify", "nowhere", "--all"], 3),
        (["show", "ckpts", "--step", "7"], 3),
        (["diff", "ckpts", "nowhere"], 3),
        (["prune", "nowhere", "--keep", "2"], 3),
        (["prune", "ckpts/step-0000000001", "--keep", "2"], 3),
        (["show", "letter"], 3),
        (["prune", "ckpts"], 2),
        (["prune", "ckpts", "--keep", "0"], 2),
        (["prune", "ckpts", "--keep", "2", "--best", "1"], 2),
        (["prune", "ftp://host/x", "--keep", "2"], 2),
        (["verify", "ckpts", "--all", "--step", "1"], 2),
        (["show", "ckpts", "--step", "-1"], 2),
        (["dance"], 2),
        ([], 2),
        (["--help"], 0),
        (["--version"], 0),
        (["prune", "--help"], 0),
    ],
)
def test_the_exit_code_says_how_it_ended(arguments, code, call):
    fill(steps=(1,))
    Path("letter").write_text("dear")
    found, out, err = call(*arguments)
    assert found == code
    assert "Traceback" not in out + err
    assert not os.path.exists("nowhere")
    assert bool(err) == bool(code)


def test_an_error_is_a_document_as_well(ask):
    code, document = ask("show", "nowhere")
    assert (code, list(document), document["error"]["kind"]) == (3, ["error"], "CheckpointNotFound")


def test_help_names_the_exit_codes(call):
    for arguments in (["--help"], ["verify", "--help"]):
        assert "Exit codes: 0 fine; 1 damage" in call(*arguments)[1]


# -- hostile names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ls", "show", "diff", "verify", "prune"])
def test_nothing_that_moves_a_cursor_reaches_the_terminal(command, call, ask):
    os.mkdir(EVIL)
    fill(f"{EVIL}/a", steps=(1, 2), **{EVIL: 1.0})
    model = {EVIL: torch.ones(2)}
    fill_one = gockpt.Checkpointer(model, None, f"{EVIL}/b", options=gockpt.Options(window=1))
    with fill_one as saver:
        saver.after_step(1, {EVIL: "x"}).result()
    flip(next(Path(f"{EVIL}/b/step-0000000001/model").glob("*/c.0")))
    a, b = f"{EVIL}/a", f"{EVIL}/b"
    arguments = {
        "ls": [a],
        "show": [b, "--tensors"],
        "diff": [a, b],
        "verify": [b],
        "prune": [a, "--keep", 1],
    }[command]
    _, out, err = call(command, *arguments)
    for text in (out, err):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]", text)
    assert "\\x1b[31mred\\x07\\u202e" in out
    assert ask(command, *arguments)[1]


@given(st.text())
def test_escaping_can_be_undone_and_shows_all(text):
    shown = printable(text)
    assert shown.encode("utf-8").decode() == shown
    assert all(char.isprintable() or char.isspace() for char in shown)
    escape = re.compile(r"\\(\\|[nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
    named = {"\\": "\\", "n": "\n", "r": "\r", "t": "\t"}
    assert escape.sub(lambda m: named.get(m[1]) or chr(int(m[1][1:], 16)), shown) == text


def test_sizes_are_rounded_to_the_right_unit():
    shown = [byte_size(n) for n in (0, 999, 1000, 999_949, 999_950, 10**15, 10**19)]
    assert shown == ["0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "1.0 PB", "10000.0 PB"]


# -- as a process -------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-W", "error", "-m", "gockpt.cli"]


def test_it_starts_without_torch():
    fill(steps=(1, 2))
    script = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['numba'] = sys.modules['zarr'] = None\n"
        "from gockpt.cli.run import run\n"
        "for arguments in (['ls', 'ckpts'], ['show', 'ckpts', '--tensors'], ['verify', 'ckpts', '--all'],\n"
        "                  ['diff', 'ckpts', 'ckpts'], ['prune', 'ckpts', '--keep', '1']):\n"
        "    assert run(arguments) == 0, arguments\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_is_no_error():
    fill(steps=range(1, 4))
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*COMMAND, "ls", "ckpts", "--json"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_ctrl_c_ends_it_quietly():
    fill(steps=(1,))
    os.unlink("ckpts/step-0000000001/model/weight/c.0.0")
    script = (
        "import os, signal\n"
        # Whoever started the tests in the background may have had it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from gockpt.storage.read.checkpoint import StoredCheckpoint\n"
        "StoredCheckpoint.verify = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)\n"
        "from gockpt.cli import main\n"
        "import sys; sys.argv = ['gockpt', 'verify', 'ckpts']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "interrupted")


def test_on_a_terminal_there_are_bars_and_only_there():
    fill(steps=(1,))
    master, slave = pty.openpty()
    done = subprocess.run(
        [*COMMAND, "verify", "ckpts"],
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**os.environ, "TERM": "xterm"},
        check=True,
    )
    os.close(slave)
    shown = os.read(master, 1 << 16)
    os.close(master)
    assert b"the newest" in shown
    assert b"ok (" in done.stdout
    assert b"\x1b" not in done.stdout


@pytest.mark.parametrize("output", ["full", "closed", "left"])
@pytest.mark.parametrize(
    "arguments",
    [["ls", "ckpts"], ["ls", "ckpts", "--json"], ["--help"], ["show", "no"]],
)
def test_output_that_can_not_be_written_is_one_line(arguments, output):
    fill(steps=(1,))
    reading, writing = os.pipe()
    os.close(reading)
    command = [*COMMAND, *arguments]
    if output == "closed":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    with open("/dev/full", "wb") as full:
        stdout = full if output == "full" else writing
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    code = {"full": 4, "closed": 4, "left": 141}[output]
    if arguments == ["show", "no"]:  # it prints nothing there
        code = 3
    elif (arguments, output) == (["--help"], "closed"):
        code = 0  # as other commands have it
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("gockpt: ") for line in lines)
    assert len(lines) == {0: 0, 3: 1, 4: 1, 141: 0}[code]


def test_an_error_that_can_not_be_told_is_still_an_exit_code():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "ls", "nowhere"], stdout=full, stderr=full, check=False)
    assert done.returncode == 3


def test_what_the_encoding_lacks_is_escaped():
    model = {"grüße→": torch.ones(2)}
    with gockpt.Checkpointer(model, None, "ckpts") as saver:
        saver.after_step(1, {"größe": 1.0}).result()
    for arguments in (["ls", "ckpts"], ["show", "ckpts", "--tensors"], ["diff", "ckpts", "ckpts"]):
        done = subprocess.run(
            [*COMMAND, *arguments],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            check=False,
        )
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
        assert done.stdout.isascii()
        assert arguments[0] == "diff" or b"\\xf6" in done.stdout or b"gr\\xfc\\xdfe\\u2192" in done.stdout


def test_log_lines_are_escaped_as_well():
    os.mkdir(EVIL)
    fill(f"{EVIL}/a", steps=(1, 2))
    flip(f"{EVIL}/a/step-0000000001/gockpt.json")
    done = subprocess.run([*COMMAND, "ls", f"{EVIL}/a"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("gockpt: warning: passing over a damaged checkpoint: ")
    assert "\\x1b[31mred\\x07\\u202e" in line
    assert "\x1b" not in done.stderr


# Unicode's Default_Ignorable_Code_Point, and other characters without ink.
BLANK = [
    *("\u00ad", "\u034f", "\u061c", "\u115f", "\u1160", "\u17b4", "\u17b5", "\u180b", "\u180e", "\u180f"),
    *("\u200b", "\u200d", "\u200e", "\u202a", "\u202e", "\u2060", "\u2065", "\u2066", "\u2069", "\u206f"),
    *("\u3164", "\ufe00", "\ufe0f", "\ufeff", "\uffa0", "\ufff0", "\U0001bca0", "\U0001d173", "\U000e0000"),
    *("\U000e0001", "\U000e0100", "\U000e01ef", "\U000e0fff", "\u00a0", "\u2007", "\u2800", "\u3000"),
]


@pytest.mark.parametrize("char", BLANK, ids=ascii)
def test_what_is_not_seen_is_escaped(char):
    shown = printable(f"a{char}b")
    assert shown.isascii()
    assert shown == f"a{char.encode('unicode_escape').decode()}b"


def test_nobody_reads_a_table():
    fill(steps=(1,))
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "ls", "ckpts"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.returncode == 141
