"""The code of the documents runs as it stands.

A page is one test: its blocks build on one another, and run in order in one folder. Python is
executed, `fxshare` is run through the command line in this process, YAML is a configuration that
loads, `text` is a picture. A block that cannot be run says why in a comment before it (see
`blocks.py`). Pages that take long are run with -m slow; of all of them Python's syntax, the command
lines and configurations are read.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

import fxshare.embedded
from fxshare.cli import main, make_app
from fxshare.config import load_config
from tests.documents.blocks import Block, blocks_of, commands_of
from tests.documents.conftest import ROOT
from tests.embedded.shallow import first_layers

PAGES = [
    "README.md",
    "docs/tutorial.md",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs" / "how-to").glob("*.md")),
]

_SMALL = "--repeats 1 --modes eager --prefill 16 --variants lowered"
_QUICK = "--set planner.search=off --set planner.strategy=separate"
SHORTER = {
    "README.md": {
        '"model.pt2", to="pt2"': '"dense/", to="dense"',
        "--keep 0.8": f"{_QUICK} --keep 0.8",
        "bench device": "bench device --repeats 1 --no-compiled",
        "bench run out/": f"bench run out/ {_SMALL}",
        "model.onnx --to onnx": "model.safetensors --to dense",
    },
    "docs/how-to/generate.md": {"max_new_tokens=64": "max_new_tokens=8"},
    "docs/how-to/hugging-face.md": {"--samples 128 --length 2048": "--samples 8 --length 32"},
    "docs/how-to/large-models.md": {
        '{"budget": {"params_kept": 0.8}}]': (
            '{"budget": {"params_kept": 0.8}, "planner": {"strategy": "separate"}}]'
        ),
    },
    "docs/how-to/measure-speed.md": {
        "--keep 0.8": f"{_QUICK} --keep 0.8",
        "bench device": "bench device --repeats 1 --no-compiled",
        "bench run out/": f"bench run out/ {_SMALL}",
        "--shape 1024,4,16,4096": f"--shape 16,2,2,32 {_SMALL}",
    },
    # a small random model in place of the packaged one, text that its tokenizer reads
    "docs/how-to/plan-a-budget.md": {
        "embedded": "./my-gpt2",
        "stdlib:held-out": "corpus.txt",
        "stdlib": "corpus.txt",
        "planner.strategy=auto --set planner.search=quick": "planner.strategy=layers",
        "[0, 7]": "[1]",
        "rank_multiple=8": "rank_multiple=2",
        "h.3": "h.1",
    },
    "docs/how-to/refine.md": {
        "steps=100)": "steps=8)",
        "steps=10, objective": "steps=2, objective",
        "steps=20)": "steps=2)",
        "--keep 0.5": f"{_QUICK} --keep 0.5",
        "--steps 40": "--steps 8",
    },
    "docs/how-to/write-a-configuration.md": {
        "--keep 0.8": f"{_QUICK} --keep 0.8",
        '{"params_kept": 0.8}}]': '{"params_kept": 0.8}, "planner": {"search": "off"}}]',
    },
    "docs/tutorial.md": {
        "pack(token_stream(text, tokenizer))": "pack(token_stream(text, tokenizer))[:6]",
        'planned = {"budget": {"params_kept": 0.8}}': (
            'planned = {"budget": {"params_kept": 0.8}, "planner": '
            '{"search": "off", "strategy": "separate"}}'
        ),
        "--data stdlib:held-out": "--data stdlib:held-out --tokens 2048",
    },
}
"""What a page says, and what is run instead because it would take long."""


class Page:
    """Runs the blocks of one page, one after the other, in the current folder."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.scope: dict[str, Any] = {"__name__": "document"}

    def run(self, block: Block) -> None:
        """Run a block; ``AssertionError`` where there is no way to and the page does not say so."""
        if block.reason is not None:
            assert block.reason, f"{self.name}:{block.line}: 'not run' gives no reason"
        elif block.language == "text":  # a picture, or what a command prints
            pass
        elif block.language == "yaml":
            self._configuration(block)
        elif block.saved_as is not None:
            Path(block.saved_as).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, self.name, "exec")
            exec(code, self.scope)
        elif block.language in {"sh", "console"}:
            for command in commands_of(block.text):
                assert command[0] == "fxshare", f"{self.name}:{block.line}: {command} is not run"
                assert main(command[1:]) == 0, f"{self.name}:{block.line}: {command} fails"
        else:
            raise AssertionError(
                f"{self.name}:{block.line}: a block of {block.language or 'no language'} is neither"
                " run nor marked; put <!-- not run: WHY --> before it"
            )

    def _configuration(self, block: Block) -> None:
        if block.saved_as is not None:
            Path(block.saved_as).write_text(block.text, encoding="utf-8")
        load_config(yaml.safe_load(block.text))


def _leaves(command: Any) -> Iterator[Any]:
    inner = getattr(command, "commands", {}).values()
    yield from (leaf for one in inner for leaf in _leaves(one)) if inner else (command,)


@functools.cache
def _reading() -> Any:
    """The command line, whose commands do nothing."""
    command = typer.main.get_command(make_app())
    for leaf in _leaves(command):
        leaf.callback = lambda **options: None
    return command


def read(name: str, text: str) -> None:
    """Read the blocks of a page without running them; raises what is wrong with one."""
    for block in blocks_of(text):
        if block.reason is not None:
            continue
        if block.language == "python" and block.saved_as is None:
            compile(block.text, name, "exec")
        elif block.language == "yaml":
            load_config(yaml.safe_load(block.text))
        elif block.language in {"sh", "console"}:
            for arguments in commands_of(block.text):
                assert arguments[0] == "fxshare", f"{name}:{block.line}: {arguments}"
                _reading()(arguments[1:], standalone_mode=False)


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_the_page_can_be_read(name: str) -> None:
    read(name, (ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("```sh\nfxshare plan embedded --keeps 0.5\n```", "No such option"),
        ("```sh\nfxshare plans embedded\n```", "No such command"),
        ("```python\nplan = fxshare.plan(model\n```", "was never closed"),
        ("```yaml\nbudgets: {params_kept: 0.8}\n```", "budgets"),
    ],
)
def test_a_block_that_is_wrong_is_noticed(block: str, error: str) -> None:
    with pytest.raises(Exception, match=error):
        read("page.md", block)


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_the_page_runs(name: str, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxshare.embedded, "load_embedded", lambda: first_layers(2))
    text = (ROOT / name).read_text(encoding="utf-8")
    for said, run in SHORTER.get(name, {}).items():
        assert said in text, f"{name} does not say {said!r} any more"
        text = text.replace(said, run)
    page, modules = Page(name), set(sys.modules)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks_of(text):
            page.run(block)
    for module in set(sys.modules) - modules:
        file = getattr(sys.modules[module], "__file__", None)
        if file is not None and Path(file).resolve().is_relative_to(room):
            del sys.modules[module]


# what the above rests on ------------------------------------------------------------------------


def test_blocks_are_found_with_what_is_said_of_them() -> None:
    page = (
        "Save this as `a.yaml`:\n\n```yaml\nx: 1\n```\n\n<!-- run:\ny = 2\n-->\n"
        "<!-- not run: takes hours -->\n```sh\nfxshare demo\n```\n"
    )
    assert list(blocks_of(page)) == [
        Block(4, "yaml", "x: 1\n", None, "a.yaml"),
        Block(8, "python", "y = 2\n"),
        Block(12, "sh", "fxshare demo\n", "takes hours"),
    ]


@pytest.mark.parametrize(
    "page",
    [
        "- in a list\n\n  ```sh\n  fxshare demo\n  ```\n",
        "```sh\nfxshare demo\n",
        "<!-- not run: why -->\n\nA sentence.\n\n```sh\nfxshare demo\n```\n",
        "<!-- not run: why -->\n",
    ],
)
def test_a_block_that_would_be_overlooked_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match=r"fences|does not stand before"):
        list(blocks_of(page))


def test_commands_of_a_shell_block() -> None:
    text = "$ fxshare plan a \\\n      --keep 0.8   # less\nfxshare eval out/ && fxshare x 'a b'\n"
    assert commands_of(text) == [
        ["fxshare", "plan", "a", "--keep", "0.8"],
        ["fxshare", "eval", "out/"],
        ["fxshare", "x", "a b"],
    ]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Block(3, "rust", "fn main() {}"), "page.md:3: a block of rust is neither run nor marked"),
        (Block(3, "sh", "rm -r /"), "page.md:3: .* is not run"),
        (Block(3, "sh", "fxshare inspect nowhere"), "page.md:3: .* fails"),
        (Block(3, "sh", "pip install it", ""), "gives no reason"),
    ],
)
def test_a_block_that_does_not_run_is_a_failure(block: Block, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        Page("page.md").run(block)


def test_an_exception_names_the_line_of_the_page() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        Page("page.md").run(Block(7, "python", "x = 1\ny = x / 0\n"))
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == ("page.md", 8)
