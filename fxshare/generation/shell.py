"""The generation loop of a model's own class around graphs that run its steps."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from fxshare.capture import device_of, dtype_of, guard_nodes
from fxshare.errors import FxShareWarning, GuardError
from fxshare.generation.check import check_program
from fxshare.generation.check_encoder_decoder import check_decoder, check_encoder
from fxshare.generation.check_own_code import check_against_own_code
from fxshare.generation.encoder_decoder import mark_filled, put_encoder
from fxshare.generation.module_form import module_form, unread_by
from fxshare.generation.narrow_cache import check_width
from fxshare.generation.program import Program, capture_program
from fxshare.generation.rollback import Rollback
from fxshare.generation.step import CACHE, CacheKind, Kind, flat, kind_of, with_mask
from fxshare.generation.unread import check_unread
from fxshare.models.structure import Structure, structure_of
from fxshare.result.module import record_of
from passes.errors import FxShareError
from passes.graph.graph import structure_copy

_MADE = "steps"
_KEPT = "logits_to_keep"


@dataclass(eq=False)
class Steps:
    """The graphs of one compiled model, one for each kind of step, and how to run a step."""

    gm: nn.Module
    dtype: torch.dtype
    device: torch.device
    """Where ``gm`` was when this generation began; the loop asks at every token."""
    programs: dict[Kind, Program | None] = field(default_factory=dict)
    """None where the model's own code runs the step."""
    ready: dict[Kind, fx.GraphModule] = field(default_factory=dict)
    """The graphs over the modules that ``gm`` had when this generation began."""
    compiled: dict[tuple[int, str], Callable[..., Any]] = field(default_factory=dict)
    ran: set[Kind] = field(default_factory=set)
    """The kinds whose graph has run to its end."""
    own_code: nn.Module | None = None

    def run(self, shell: nn.Module, arguments: Mapping[str, Any], options: Any = None) -> Any:
        """One step; under ``torch.compile`` where there are ``options`` for it."""
        values = with_mask(flat(arguments))
        last = values.get(_KEPT, 0)
        if type(last) is int and last > 1 and CACHE in values:
            # assisted decoding wants another number each time: one graph gives all
            output = self.run(shell, {**arguments, _KEPT: 0}, options)
            output["logits"] = output["logits"][:, -last:]
            return output
        kind = None if self.gm.training or CACHE not in values else kind_of(values)
        graph = None if kind is None else self._graph(shell, kind)
        if graph is None or kind is None:
            if kind is None and values.get("use_cache") is not False:
                self._note_cache(values.get(CACHE))
            return self._by_own_code(arguments, options)
        known = kind in self.ran
        before = None if known and not guard_nodes(graph) else Rollback(values[CACHE])
        try:
            output = self._faster(graph, options)(**{name: values[name] for name in kind.inputs})
        except Exception as error:  # at the first run of a graph whatever its code may do
            if before is None or (known and not isinstance(error, GuardError)):
                raise
            before.undo()
            output = self._by_own_code(arguments, options)
            self._give_up(kind, error)
            return output
        self.ran.add(kind)
        if kind.cache is not None and kind.cache.cross is not None and not kind.cache.filled:
            mark_filled(values[CACHE])
        return output

    def encode(self, shell: nn.Module, arguments: Mapping[str, Any]) -> Any:
        """What the encoder of an encoder-decoder model makes of its input."""
        values = flat(arguments)
        kind = None if self.gm.training else kind_of(values)
        graph = None if kind is None else self._graph(shell, kind)
        if graph is None or kind is None:
            return self._encoded_by_own_code(arguments)
        try:
            return graph(**{name: values[name] for name in kind.inputs})
        except Exception as error:
            output = self._encoded_by_own_code(arguments)
            self._give_up(kind, error)
            return output

    def _own_code(self) -> Any:
        if self.own_code is None:
            self.own_code = module_form(self.gm)
        return self.own_code

    def _by_own_code(self, arguments: Mapping[str, Any], options: Any) -> Any:
        check_width(arguments.get(CACHE), record_of(self.gm).plan)
        own = self._own_code()
        output = self._faster(own, options)(**arguments)
        check_unread(output, unread_by(own), "a step in the model's own code")
        return output

    def _encoded_by_own_code(self, arguments: Mapping[str, Any]) -> Any:
        own = self._own_code()
        output = own.get_encoder()(**arguments)
        check_unread(output, unread_by(own), "the encoder in the model's own code")
        return output

    def _note_cache(self, cache: Any) -> None:
        """Say once that steps with such a cache have no graph; that is no failure."""
        if self.gm.training or CacheKind.of(cache) is not None:
            return
        what = "without a cache" if cache is None else f"with a {type(cache).__name__}"
        note = f"generate: a step {what}, which no graph takes, runs the model's own code"
        if note not in record_of(self.gm).report.notes:
            _add_note(self.gm, note)

    def _give_up(self, kind: Kind, error: Exception) -> None:
        """Let the model's own code run these steps from now on, and say why."""
        self.programs[kind] = None
        self.ready.pop(kind, None)
        why = str(error) if isinstance(error, FxShareError) else f"{type(error).__name__}: {error}"
        note = f"generate: {kind} runs the model's own code, because no graph does: {why}"
        _add_note(self.gm, note)
        warnings.warn(note, FxShareWarning, stacklevel=2)

    def _graph(self, shell: nn.Module, kind: Kind) -> fx.GraphModule | None:
        if kind in self.ready:
            return self.ready[kind]
        if kind not in self.programs:
            self.programs[kind] = self._captured(shell, kind)
        program = self.programs[kind]
        if program is None:
            return None
        self.ready[kind] = program.bound(self.gm)
        return self.ready[kind]

    def _captured(self, shell: nn.Module, kind: Kind) -> Program | None:
        try:
            # generate() runs under no_grad or inference_mode; tensors made here outlive it
            with torch.inference_mode(False), torch.no_grad():
                program = capture_program(self.gm, shell, kind)
                self._check(program, shell)
        except Exception as error:  # the checks run code of the model too
            self._give_up(kind, error)
            return None
        return program

    def _check(self, program: Program, shell: nn.Module) -> None:
        cache = program.kind.cache
        if cache is None:
            check_encoder(program, self.gm)
            return
        first = program
        if cache.cross is not None and cache.filled:  # its steps come after one that fills it
            kind = replace(program.kind, cache=replace(cache, filled=False))
            first = self.programs.get(kind) or capture_program(self.gm, shell, kind)
        try:
            if cache.cross is None:
                check_program(program, self.gm, shell)
            else:
                check_decoder(program, first, self.gm, shell)
        except Exception:
            try:
                own = self._own_code()
            except FxShareError:
                own = None
            if own is None:
                raise
            check_against_own_code(program, first, self.gm, shell, own)

    def _faster(self, module: nn.Module, options: Any) -> Callable[..., Any]:
        if options is None:
            return module
        key = (id(module), repr(options))
        if key not in self.compiled:
            self.compiled[key] = torch.compile(module, **options)
        return self.compiled[key]

    def begin(self) -> None:
        """Look at the modules of ``gm`` again."""
        self.ready.clear()
        self.own_code = None
        self.device = device_of(self.gm)


def generate(gm: Any, *args: Any, **kwargs: Any) -> Any:
    """``gm.generate``: that of the original's class, on the graph of ``gm``.

    Raises :class:`FxShareError` where the original cannot generate, or transformers is missing.
    """
    if not gm.can_generate():
        raise FxShareError(_refusal(gm))
    try:
        import transformers  # noqa: F401 - to say what is missing
    except ImportError as error:
        raise FxShareError(
            f"generate() needs transformers, which cannot be imported ({error}); "
            "pip install 'fxshare[hf]'"
        ) from error
    return shell_of(gm).generate(*args, **kwargs)


def _refusal(gm: nn.Module) -> str:
    found = structure_of(gm)
    if found is None:
        return (
            f"{type(gm).__name__} cannot generate: expected the graph of a causal language model "
            "of transformers, found that of another model; write the loop over gm(ids) yourself"
        )
    name = type(found.model).__name__
    return (
        f"{name} cannot generate: expected a model with a language head, such as the "
        "...ForCausalLM, ...LMHeadModel or ...ForConditionalGeneration class of the same family"
    )


def shell_of(gm: nn.Module) -> Any:
    """A module of the original's class, without weights, whose steps run on ``gm``."""
    structure = structure_of(gm)
    assert structure is not None
    steps = _steps(gm, structure)
    steps.begin()
    model = structure.model
    shell = copy.copy(model)
    shell.__dict__ = {**model.__dict__, "_modules": {}, "_parameters": {}, "_buffers": {}}
    shell.__dict__["_steps"] = steps
    shell.__class__ = _shell_class(type(model), structure)
    if model.config.is_encoder_decoder:
        shell._modules = dict(model._modules)
        put_encoder(shell, steps.encode)
    return shell


def _steps(gm: nn.Module, structure: Structure) -> Steps:
    found = structure.made.get(_MADE)
    if not isinstance(found, Steps) or found.gm is not gm or found.dtype != dtype_of(gm):
        found = structure.made[_MADE] = Steps(gm, dtype_of(gm), device_of(gm))
    return found


def _shell_class(cls: type, structure: Structure) -> type:
    if "class" not in structure.made:
        structure.made["class"] = _make_class(cls, structure)
    made: type = structure.made["class"]
    return made


def _make_class(cls: type, structure: Structure) -> type:
    signature = inspect.signature(cls.forward)  # type: ignore[attr-defined]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs = {**dict(zip(list(signature.parameters)[1:], args, strict=False)), **kwargs}
        return self._steps.run(self, kwargs)

    # the generation code asks the signature which arguments the model takes
    forward.__signature__ = signature  # type: ignore[attr-defined]

    def get_compiled_call(self: Any, compile_config: Any) -> Callable[..., Any]:
        options = (compile_config or self._default_compile_config()).to_dict()

        def call(**kwargs: Any) -> Any:
            return self._steps.run(self, kwargs, options)

        return call

    def __getattr__(self: Any, name: str) -> Any:
        try:
            return cls.__getattr__(self, name)  # type: ignore[attr-defined]
        except AttributeError:
            part = structure.model._modules.get(name)
            if part is None:
                raise
        # code of a generation loop that keeps something in a module below, as positions in images
        self._modules[name] = structure_copy(part)
        return self._modules[name]

    members = {
        "forward": forward,
        "__getattr__": __getattr__,
        "get_compiled_call": get_compiled_call,
        "device": property(lambda self: self._steps.device),
        "dtype": property(lambda self: self._steps.dtype),
        "__module__": cls.__module__,
    }
    return type(f"{cls.__name__}Shared", (cls,), members)


def _add_note(gm: nn.Module, note: str) -> None:
    record = record_of(gm)
    report = replace(record.report, notes=(*record.report.notes, note))
    gm.__dict__["meta"]["fxshare"] = replace(record, report=report)


__all__ = ["Steps", "generate", "shell_of"]
