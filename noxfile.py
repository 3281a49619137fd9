"""The checks as sessions, each in an environment of its own: ``nox``, or ``nox -s lowest``.

``uv`` makes the environments; ``UV_TORCH_BACKEND=cpu nox ...`` keeps it from fetching builds of
torch with CUDA. ``nox -s lowest -- 'torch==2.13.0'`` takes this torch, and the lowest of the rest.
"""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "docs", "tests"]
nox.options.error_on_missing_interpreters = True  # a session that was skipped has not passed


@nox.session
def tests(session: nox.Session) -> None:
    """The tests that are not slow; arguments go to pytest."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """The slow tests, with the packages that only they have; arguments go to pytest."""
    session.install("-e", ".[test,others]")
    session.run("python", "-m", "pytest", "-m", "slow", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types, as CI and the commit hooks check them."""
    session.install("-e", ".[test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, with warnings as errors."""
    session.install("-e", ".[docs]")
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")


@nox.session(python="3.10")  # also because numpy 1.24 has no builds for 3.12 and later
def lowest(session: nox.Session) -> None:
    """The tests that are not slow, on the lowest versions that pyproject.toml allows, Python too.

    Arguments are requirements that are not to be the lowest.
    """
    session.install("--resolution", "lowest-direct", "-e", ".[test,others]", *session.posargs)
    session.run("uv", "pip", "freeze", external=True)
    session.run("python", "-m", "pytest")
