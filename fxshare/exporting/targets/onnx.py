"""``onnx``: an ONNX model of torch's dynamo exporter, run by onnxruntime."""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshare.capture import device_of, dtype_of
from fxshare.capture.call import Call
from fxshare.errors import ExportError
from fxshare.exporting.outputs import refilled
from fxshare.exporting.program import traced
from fxshare.exporting.subject import Subject
from fxshare.exporting.written import Written

OLDEST_OPSET = 18
"""The opset that torch writes its operators in; for an older one it would convert and guess."""
_LARGEST_FILE = 2**31 - 2**24
_REQUIRED = ("onnx", "onnxscript", "onnxruntime")


def check_opset(opset: int | None) -> None:
    """Refuse early what cannot be written: :class:`ExportError` for a missing package, and for an
    opset that is too old or not known yet."""
    onnx, *_ = _imported()
    newest = int(onnx.defs.onnx_opset_version())
    whole = isinstance(opset, int) and not isinstance(opset, bool)
    if opset is not None and not (whole and OLDEST_OPSET <= opset <= newest):
        raise ExportError(
            f"opset: expected {OLDEST_OPSET} (what torch writes its operators in) to {newest} "
            f"(onnx {onnx.__version__}), found {opset!r}; leave it out, or convert the file with "
            "onnx.version_converter"
        )


def write(
    subject: Subject, path: Path, opset: int | None, largest_file: int = _LARGEST_FILE
) -> Written:
    """Write ``path``; weights of more than 2 GB go into ``<name>.data`` beside it (or, in place of
    an older export, ``<name>.<digits>.data``: the file names the one it belongs to).

    Inputs have the names of the arguments, outputs those of the dictionary's keys, or ``output_0``,
    ``output_1``, ... Rows that the attention mask leaves out are not defined.

    Raises :class:`ExportError` where an operator has no ONNX form or onnxruntime refuses the file.
    """
    check_opset(opset)
    _, _, onnxruntime = _imported()
    found = traced(subject, onnx=True)
    names = _output_names(subject.shown)
    write_program(
        found.program,
        path,
        inputs=subject.inputs,
        input_names=_input_names(subject.inputs),
        output_names=names,
        opset=opset,
        what=subject.name,
        largest_file=largest_file,
    )
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise refused(subject, error) from error

    def run(call: Call) -> Any:
        tensors = [t for t in pytree.tree_leaves(dict(call)) if isinstance(t, Tensor)]
        given = dict(zip(_input_names(call), tensors, strict=True))
        read = [put.name for put in session.get_inputs()]  # an input that nothing reads is dropped
        feed = {name: given[name].detach().cpu().numpy() for name in read}
        device = device_of(subject.model)
        outputs = [torch.from_numpy(array).to(device) for array in session.run(names, feed)]
        return refilled(subject.shown, outputs)

    return Written(run, found.batch, found.sequence, found.notes, unmasked_only=True)


def write_program(
    program: torch.export.ExportedProgram,
    path: Path,
    *,
    inputs: Call,
    input_names: list[str],
    output_names: list[str],
    opset: int | None,
    what: str,
    largest_file: int = _LARGEST_FILE,
) -> None:
    """Write a program, its weights beside it where they are more than ``largest_file`` bytes.

    Raises :class:`ExportError` naming ``what`` where an operator has no ONNX form.
    """
    with warnings.catch_warnings(), _silence("torch.onnx"), _silence("onnxscript"):
        warnings.simplefilter("ignore")
        try:
            made: Any = torch.onnx.export(
                program,
                (),
                kwargs=dict(inputs),
                input_names=input_names,
                output_names=output_names,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(reason(f"torch.onnx cannot export {what}", error)) from error
    _strip(made.model)
    size = sum(t.nbytes for t in program.state_dict.values())
    made.save(path, external_data=size > largest_file)


def rename_data(path: Path, old: str, new: str) -> None:
    """Make the graph in ``path`` refer to its data by another name."""
    onnx, *_ = _imported()
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value == old:
                entry.value = new
    path.write_bytes(model.SerializeToString())


def _imported() -> list[Any]:
    try:
        return [importlib.import_module(name) for name in _REQUIRED]
    except ImportError as error:
        raise ExportError(
            f"to='onnx' needs {', '.join(_REQUIRED)}, and {error.name or 'one of them'} cannot be "
            "imported; pip install 'fxshare[onnx]'"
        ) from error


def _input_names(call: Call) -> list[str]:
    return _names(dict(call), None)


def _output_names(shown: Any) -> list[str]:
    return _names(shown, "output")


def _names(value: Any, name: str | None) -> list[str]:
    """A name for every tensor, made of keys and places."""
    if isinstance(value, Tensor):
        return [name or "output"]
    items: list[tuple[object, Any]] = []
    if isinstance(value, dict):
        top = name in (None, "output")
        items = [(key if top else f"{name}_{key}", v) for key, v in value.items()]
    elif isinstance(value, (tuple, list)):
        items = [(f"{name}_{i}", v) for i, v in enumerate(value)]
    return [found for key, v in items for found in _names(v, str(key))]


def _strip(model: Any) -> None:
    """Drop the exporter's notes to itself: stack traces with local paths, names of Python code."""
    model.metadata_props.clear()
    model.doc_string = None
    graphs = [model.graph, *model.functions.values()]
    for graph in graphs:
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


class _silence:
    """The exporter logs each of its steps as a warning."""

    def __init__(self, logger: str) -> None:
        self._logger = logging.getLogger(logger)

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)


def refused(subject: Subject, error: Exception) -> ExportError:
    """What is raised where onnxruntime takes no model that was written."""
    out = ""
    if dtype_of(subject.model) is torch.bfloat16:
        out = "; on a processor it has few operators in bfloat16: export gm.float(), or gm.half()"
    return ExportError(reason("onnxruntime refuses the model", error) + out)


def reason(what: str, error: Exception) -> str:
    """``what``, and the first line of an error of another library with that of its cause."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    cause = error.__cause__
    because = f" ({type(cause).__name__}: {str(cause).splitlines()[0]})" if cause else ""
    return f"{what}: {type(error).__name__}: {lines[0] if lines else ''}{because}"
