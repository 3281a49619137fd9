"""The command line as a process of its own: streams, exit codes, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fxshare import __version__
from fxshare.cli import main, output
from fxshare.errors import CheckFailed
from passes.errors import FxShareError

COMMAND = (sys.executable, "-m", "fxshare")


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    cleared = {"FORCE_COLOR", "FXSHARE_DEBUG", "COLUMNS"}
    environment = {k: v for k, v in os.environ.items() if k not in cleared} | variables
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


@pytest.mark.parametrize("quiet", [pytest.param(True, marks=pytest.mark.slow), False])
def test_json_alone_on_stdout_and_no_progress_bar_in_a_pipe(folder: Path, quiet: bool) -> None:
    command = ("compile", "cli_toy:make", "-c", "sharing.yaml", "--calibration", "ids.npy")
    options = ("--length", "20", "--json", *(("--quiet",) if quiet else ()))
    ran = run(folder, *command, *options, PYTHONIOENCODING="utf-8")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["sites"] == 8
    # what the model's own code prints, and the stages unless --quiet: no progress, no notes
    stage = re.compile(r"[a-z]+: (started|done in \d+\.\d s( \(.*\))?)")
    lines = ran.stderr.splitlines()
    assert {line for line in lines if not stage.fullmatch(line)} == {"the factory talks"}
    assert ("capture: started" in lines) != quiet


def test_an_error_is_one_line_without_a_traceback(folder: Path) -> None:
    ran = run(folder, "inspect", "gpt2", "--json")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: 'gpt2' is not a model")
    assert len(ran.stderr.splitlines()) == 1
    assert "\x1b" not in ran.stderr


def test_an_interrupt(folder: Path) -> None:
    (folder / "cli_sleeps.py").write_text(
        "import time\n\ndef make():\n    print('asleep', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [*COMMAND, "inspect", "cli_sleeps:make"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # what a shell starts in the background has interrupts ignored, and so have its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "asleep\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")


def test_help_is_light(folder: Path) -> None:
    code = (
        "import sys; from fxshare.cli import main; assert main(['--help']) == 0; "
        "assert main(['--version']) == 0; assert main(['compile', '--help']) == 0; "
        "assert not {'torch', 'numpy', 'transformers', 'rich.progress'} & "
        "set(sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    for command in [
        "demo",
        "init",
        "validate",
        "plan",
        "compile",
        "verify",
        "inspect",
        "eval",
        "schema",
    ]:
        assert re.search(rf"^ *│? *{command} ", ran.stdout, re.MULTILINE)


# in this process --------------------------------------------------------------------------------


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FXSHARE_DEBUG", "1")
    assert main(["inspect", "gpt2"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("error: 'gpt2' is not a model")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fxshare {__version__}\n"


@pytest.mark.parametrize(
    "command",
    ["demo", "init", "validate", "plan", "compile", "verify", "inspect", "eval", "schema"],
)
def test_every_command_has_an_example_and_json(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"fxshare {command}" in text.split("Example", 1)[1]
    assert "--json" in text
    assert "--debug" in text


@pytest.mark.parametrize("arguments", [["--sett"], ["compil"], [], ["plan", "a", "b"]])
def test_a_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "--help' shows what it takes" in captured.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FxShareError("of ours"), 1),
        (CheckFailed("too far"), 3),
        (KeyboardInterrupt(), 130),
        (KeyError("of nobody"), 1),
        (PermissionError(13, "Permission denied", "plan.json"), 1),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("fxshare.config.json_schema", fail)
    assert main(["schema"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err


def test_a_long_error_is_not_wrapped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    message = "[bold]brackets[/bold] :smile:" + " word" * 60
    output.show_error(message)
    assert capsys.readouterr().err == f"error: {message}\n"


def test_json_has_no_numbers_that_json_lacks() -> None:
    text = output.json_text({"a": float("nan"), "b": (float("inf"), 1.5), "c": "→"})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": "→"}
    assert "→" in text
