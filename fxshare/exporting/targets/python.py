"""``py``: a folder with the graph as a Python module, and its tensors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx

from fxshare.capture import device_of
from fxshare.errors import ExportError
from fxshare.exporting.certifying.certificate import NAME as CERTIFICATE
from fxshare.exporting.subject import Subject
from fxshare.exporting.targets.closed_graph import closed_graph
from fxshare.exporting.targets.python_source import Source, source_of
from fxshare.exporting.written import Written

CODE, TENSORS = "model.py", "model.safetensors"


def ours(name: str) -> bool:
    """Whether a folder of this target may hold a file of that name."""
    return name in (CODE, TENSORS, CERTIFICATE, "__pycache__")


def write(subject: Subject, path: Path) -> Written:
    """Write the folder ``path`` with ``model.py``, which imports torch and safetensors only, and
    ``model.safetensors``; ``model.load()`` returns the module.

    Raises :class:`ExportError` for a model captured at module granularity, and naming the module or
    function that is neither torch's nor Python's.
    """
    if not isinstance(subject.model, fx.GraphModule):
        raise ExportError(
            f"to='py' writes one graph, and {subject.name} was captured at module granularity: its "
            "code is the original's. Compile it with an example and capture='fx', or export to "
            "'dense' and use the original's code"
        )
    gm = closed_graph(subject)
    source = source_of(gm, subject.name)
    path.mkdir()
    (path / CODE).write_text(source.text, encoding="utf-8")
    save_file(_packed(source), path / TENSORS, metadata={"format": "pt"})
    loaded = _load(path, device_of(subject.model))
    shapes = subject.shapes
    return Written(lambda call: loaded(**call), shapes.batch, shapes.sequence)


def _packed(source: Source) -> dict[str, Tensor]:
    """On the CPU and each in memory of its own: safetensors refuses views."""
    return {
        name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, t in source.tensors.items()
    }


def _load(path: Path, device: torch.device) -> Any:
    spec = importlib.util.spec_from_file_location("fxshare_exported_model", path / CODE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # not import_module: that would leave it in sys.modules, and its bytecode in the folder
    exec(compile((path / CODE).read_bytes(), str(path / CODE), "exec"), vars(module))
    return module.load(device=str(device))
