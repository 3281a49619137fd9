"""A run in a process of its own, whose peak memory is then its own.

``python -m fxshare.bench.scale.child`` reads a job as JSON from stdin and prints its result.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fxshare
from fxshare.bench.scale.measure import Job, ScaleRun, Settings, measure
from fxshare.errors import FxShareError

_COMMAND = ("-m", "fxshare.bench.scale.child")
_LOG = logging.getLogger("fxshare")


def in_own_process(job: Job) -> ScaleRun:
    """:func:`measure` in a new process; one that an error or a signal ended has no figures and says
    so in ``failed``. Its lines about stages go to stderr where this process shows them."""
    order = json.dumps({**asdict(job), "level": _LOG.getEffectiveLevel()})
    ended = subprocess.run(
        [sys.executable, *_COMMAND],
        input=order,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
        check=False,
    )
    if ended.returncode == 0:
        return ScaleRun.from_dict(json.loads(ended.stdout))
    return ScaleRun(job.shape, job.layers, job.method, failed=_reason(ended.returncode))


def _environment() -> dict[str, str]:
    """Of this process, with the code that runs here before any other of its name."""
    here = str(Path(fxshare.__file__).parents[1])
    paths = [here, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _reason(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, which the system sends where memory runs out"
    if code < 0:
        return f"ended by signal {-code}"
    return f"ended with exit code {code}; its error is on stderr"


def job_of(plain: Mapping[str, Any]) -> Job:
    """The job that was written as JSON."""
    settings = Settings(**plain["settings"])
    return Job(plain["shape"], plain["layers"], plain["method"], settings)


def _end_with(parent: int) -> None:
    """End this process when the one that waits for it has ended, however: it would work on for
    hours, and nobody would read what it found."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Measure the job on stdin; what models and libraries print goes to stderr."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    order = json.load(sys.stdin)
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    _LOG.setLevel(order["level"])
    job = job_of(order)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(job)
    except FxShareError as error:
        found = ScaleRun(job.shape, job.layers, job.method, failed=str(error))
    except KeyboardInterrupt:  # the process that waits was interrupted too, and says so
        raise SystemExit(130) from None
    print(json.dumps(found.to_dict()))


if __name__ == "__main__":
    main()
