"""``ort-genai``: an ONNX graph with a key-value cache, for ONNX Runtime GenAI."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshare.capture import device_of, erase_guards, guard_nodes, quiet
from fxshare.capture.call import MASK, Call
from fxshare.capture.tracing.lines import failing_line
from fxshare.errors import ExportError
from fxshare.exporting.certifying.certificate import NAME as CERTIFICATE
from fxshare.exporting.codes import with_plain_tensors
from fxshare.exporting.engines.worker import ort_genai
from fxshare.exporting.options import Options
from fxshare.exporting.program import compact, strip
from fxshare.exporting.subject import Subject
from fxshare.exporting.targets import onnx
from fxshare.exporting.targets.vllm import tokenizer_of
from fxshare.exporting.written import Written
from fxshare.generation.check import check_program
from fxshare.generation.program import capture_program
from fxshare.generation.shell import shell_of
from fxshare.generation.step import CACHE, CacheKind, Kind
from fxshare.models.structure import keep_structure, structure_of
from fxshare.models.traits import context_of
from fxshare.plans.keys import Keys
from fxshare.plans.whole_heads import WholeHeads
from fxshare.result.module import record_of
from fxshare.store.tokenizer import is_tokenizer_file, write_tokenizer
from fxshare.store.transformers import HF_CONFIG, HF_GENERATION, write_json
from passes.errors import FxShareError
from passes.graph.graph import structure_copy

CONFIG = "genai_config.json"
GRAPH = "model.onnx"
_IDS, _POSITIONS = "input_ids", "position_ids"
_LARGEST_FILE = 2**31 - 2**24
_CONTEXT = 2048
"""Where nothing says how many tokens a model reads, as of those that tell places by distances."""
_OLD, _NEW, _ROWS = 5, 3, 2
"""Of the step that is exported: tokens in the cache, new ones, and texts; all of them may vary."""


def ours(name: str) -> bool:
    """Whether a folder of this target may hold a file of that name."""
    known = (CONFIG, GRAPH, f"{GRAPH}.data", CERTIFICATE, HF_CONFIG, HF_GENERATION)
    return name in known or is_tokenizer_file(name)


class GivenCache:
    """What a captured step asks of its cache, over tensors that are the step's inputs."""

    def __init__(self, pasts: list[tuple[Tensor, Tensor]]) -> None:
        self.pasts = list(pasts)
        self.old = pasts[0][0].shape[-2]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the step."""
        return self.old

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The place of the step's first token."""
        return self.old

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Places that are attended to, and the first of them."""
        return self.old + query_length, 0

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens, the new ones last."""
        old_key, old_value = self.pasts[layer_idx]
        whole = torch.cat([old_key, key], -2), torch.cat([old_value, value], -2)
        self.pasts[layer_idx] = whole
        return whole


class _Step(nn.Module):
    """The graph with its cache as tensors, in and out."""

    def __init__(self, graph: nn.Module, takes: tuple[str, ...]) -> None:
        super().__init__()
        self.inside = graph  # not "graph", which exported modules have
        self.takes = takes

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        pasts: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        given = {_IDS: input_ids, MASK: attention_mask, _POSITIONS: position_ids}
        cache = GivenCache(pasts)
        output = self.inside(**{name: given[name] for name in self.takes}, **{CACHE: cache})
        return output["logits"], cache.pasts


@dataclass(frozen=True)
class _Sizes:
    """What of a model GenAI has to be told."""

    layers: int
    heads: int
    key_heads: int
    head_width: int
    width: int
    vocabulary: int
    context: int

    @staticmethod
    def of(subject: Subject, config: Any, cache: Any) -> _Sizes:
        """From the configuration, and a cache that a step has filled.

        Raises :class:`ExportError` where keys and values, or layers, differ in their sizes.
        """
        shapes = {t.shape[1::2] for layer in cache.layers for t in (layer.keys, layer.values)}
        if len(shapes) > 1:
            found = " and ".join(sorted(f"{heads} heads of {width}" for heads, width in shapes))
            raise ExportError(
                f"to='ort-genai': the cache of ONNX Runtime GenAI has one number and one width of "
                f"heads, and {subject.name} keeps {found}; export it to 'vllm' or 'onnx'"
            )
        ((key_heads, width),) = shapes
        return _Sizes(
            len(cache.layers),
            int(config.num_attention_heads),
            key_heads,
            width,
            int(config.hidden_size),
            int(config.vocab_size),
            context_of(subject.model) or _CONTEXT,
        )

    def past(self, rows: int, old: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A cache of ``old`` tokens."""
        shape = (rows, self.key_heads, old, self.head_width)
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(self.layers)]


def write(subject: Subject, path: Path, options: Options) -> Written:
    """Write the folder ``path``: ``model.onnx``, ``genai_config.json`` and the tokenizer's files;
    ``onnxruntime_genai.Model(path)`` loads it.

    Raises :class:`ExportError` for a model that makes no tokens by steps with such a cache, and
    where an operator has no ONNX form.
    """
    onnx.check_opset(options.opset)
    graph, kind, config = _captured(subject)
    sizes = _Sizes.of(subject, config, _filled_cache(graph, kind, config))
    path.mkdir()
    _write_graph(subject, _Step(graph, kind.inputs[:-1]), sizes, path / GRAPH, options.opset)
    write_json(path / CONFIG, _genai_config(config, sizes, kind.takes(_POSITIONS)))
    source = options.tokenizer or tokenizer_of(subject)
    if source is not None:
        write_tokenizer(source, path)
    run = _by_onnxruntime(subject, sizes, path / GRAPH)
    note, generate = _by_genai(path)
    return Written(run, True, True, note, unmasked_only=True, generate=generate)


def _captured(subject: Subject) -> tuple[fx.GraphModule, Kind, Any]:
    """The step of the model, its kind, and the configuration.

    Raises :class:`ExportError` with the reason for which there is none.
    """
    name = subject.name
    structure = structure_of(subject.model)
    model: Any = None if structure is None else structure.model
    if model is None or not (hasattr(model, "can_generate") and model.can_generate()):
        raise ExportError(
            "to='ort-genai' writes one step of a causal language model of transformers, and "
            f"{name} is none; export it to 'onnx'"
        )
    if model.config.is_encoder_decoder:
        raise ExportError(f"to='ort-genai': {name} has an encoder; export it to 'onnx'")
    if not isinstance(subject.model, fx.GraphModule):
        raise ExportError(
            f"to='ort-genai' writes a graph, and {name} was captured at module granularity; "
            "compile it with an example and capture='fx'"
        )
    narrow = [one for one in record_of(subject.model).plan.units if one.cached[1] < one.cached[0]]
    if narrow:
        one = narrow[0]
        what = "queries and keys" if isinstance(one, Keys) else "values"
        has, of = "width of heads", f" of its {what}"
        if isinstance(one, WholeHeads):
            has, of = "number of heads", f" {one.words.what}"
        raise ExportError(
            f"to='ort-genai': the cache of ONNX Runtime GenAI has one {has}, and "
            f"{one.name!r} of {name} keeps {one.kept} of {one.of}{of}; export it to "
            f"'vllm', 'dense' or 'onnx', or plan without {one.kind} in planner.kinds"
        )
    # what generation keeps of the caller's model stays its own
    gm = structure_copy(subject.model)
    assert structure is not None
    gm.meta = {**gm.meta}
    keep_structure(gm, model, structure.passes)
    config = model.config.get_text_config(decoder=True)
    cache = CacheKind.of(_dynamic_cache(config))
    if cache is None or set(cache.layers) != {"DynamicLayer"}:
        kinds = ", ".join(sorted(set(cache.layers))) if cache else "none"
        raise ExportError(
            f"to='ort-genai': {name} keeps something else than all keys and values (cache layers: "
            f"{kinds}), such as a sliding window; ONNX Runtime GenAI hands back a cache that "
            "grows. Export it to 'vllm' or 'onnx'"
        )
    taken = inspect.signature(type(model).forward).parameters
    tensors = [(each, 2, torch.int64) for each in (MASK, _IDS, _POSITIONS) if each in taken]
    kind = Kind(tuple(tensors), (("return_dict", True), ("use_cache", True)), cache)
    try:
        with quiet():
            shell = shell_of(gm)
            program = capture_program(gm, shell, kind)
            check_program(program, gm, shell)
            bound = program.bound(gm)
    except FxShareError as error:
        raise ExportError(f"to='ort-genai': no graph takes a step of {name}: {error}") from error
    found = with_plain_tensors(structure_copy(bound), onnx=True)
    assert isinstance(found, fx.GraphModule)
    erase_guards(found, range(len(guard_nodes(found))))
    found.recompile()
    return found, kind, config


def _filled_cache(graph: fx.GraphModule, kind: Kind, config: Any) -> Any:
    """The cache after one step of two tokens, which says what its sizes are."""
    cache = _dynamic_cache(config)
    ids = torch.ones(1, 2, dtype=torch.long, device=device_of(graph))
    given = {_IDS: ids, MASK: ids, _POSITIONS: torch.arange(2, device=ids.device)[None]}
    with quiet():
        graph(**{name: given[name] for name in kind.inputs[:-1]}, **{CACHE: cache})
    return cache


def _dynamic_cache(config: Any) -> Any:
    transformers: Any = importlib.import_module("transformers")
    return transformers.DynamicCache(config=config)


def _write_graph(
    subject: Subject, step: _Step, sizes: _Sizes, path: Path, opset: int | None
) -> None:
    like = next(p for p in subject.model.parameters() if p.is_floating_point()).detach()
    ids = torch.ones(_ROWS, _NEW, dtype=torch.long, device=like.device)
    inputs = {
        _IDS: ids,
        MASK: ids.new_ones(_ROWS, _OLD + _NEW),
        _POSITIONS: torch.arange(_OLD, _OLD + _NEW, device=like.device).expand(_ROWS, -1),
        "pasts": sizes.past(_ROWS, _OLD, like),
    }
    auto = torch.export.Dim.AUTO
    text = {0: auto, 1: auto}
    held = {0: auto, 2: auto}
    dims = {_IDS: text, MASK: text, _POSITIONS: text, "pasts": [(held, held)] * sizes.layers}
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                compact(step).eval(), (), inputs, dynamic_shapes=dims, strict=False
            )
    except Exception as error:
        raise ExportError(
            f"torch.export of a step of {subject.name} failed at {failing_line(error)}: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    strip(program)
    each = [(f"{n}.key", f"{n}.value") for n in range(sizes.layers)]
    names = [f"{part}" for pair in each for part in pair]
    onnx.write_program(
        program,
        path,
        inputs=inputs,
        input_names=[_IDS, MASK, _POSITIONS, *(f"past_key_values.{n}" for n in names)],
        output_names=["logits", *(f"present.{n}" for n in names)],
        opset=opset,
        what=f"a step of {subject.name}",
        largest_file=_LARGEST_FILE,
    )


def _genai_config(config: Any, sizes: _Sizes, positions: bool) -> dict[str, Any]:
    inputs = {
        _IDS: _IDS,
        MASK: MASK,
        **({_POSITIONS: _POSITIONS} if positions else {}),
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    end = config.eos_token_id
    last = end[0] if isinstance(end, list) else end
    known = [token for token in (config.pad_token_id, last) if token is not None]
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": next((t for t in (config.bos_token_id, *known) if t is not None), 0),
            "eos_token_id": end if end is not None else (*known, 0)[0],
            # GenAI masks this token wherever it is in a prompt: none, where the model has none
            "pad_token_id": (*known, -1)[0],
            "context_length": sizes.context,
            "vocab_size": sizes.vocabulary,
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": GRAPH,
                "head_size": sizes.head_width,
                "hidden_size": sizes.width,
                "num_attention_heads": sizes.heads,
                "num_hidden_layers": sizes.layers,
                "num_key_value_heads": sizes.key_heads,
                "inputs": inputs,
                "outputs": outputs,
            },
        },
        "search": {
            "do_sample": False,
            "max_length": sizes.context,
            "past_present_share_buffer": False,
        },
    }


def _by_onnxruntime(subject: Subject, sizes: _Sizes, path: Path) -> Callable[[Call], Any]:
    """The graph on whole texts, with nothing in the cache."""
    runtime: Any = importlib.import_module("onnxruntime")
    try:
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise onnx.refused(subject, error) from error
    like = next(p for p in subject.model.parameters() if p.is_floating_point()).detach().cpu()
    read = [put.name for put in session.get_inputs()]

    def run(call: Call) -> Any:
        ids = call[_IDS].cpu()
        mask = call.get(MASK)
        given = {
            _IDS: ids,
            MASK: torch.ones_like(ids) if mask is None else mask.cpu(),
            _POSITIONS: torch.arange(ids.shape[1]).expand(len(ids), -1),
        }
        for layer, pair in enumerate(sizes.past(len(ids), 0, like)):
            for what, tensor in zip(("key", "value"), pair, strict=True):
                given[f"past_key_values.{layer}.{what}"] = tensor
        (logits,) = session.run(["logits"], {name: given[name].numpy() for name in read})
        return {"logits": torch.from_numpy(logits).to(device_of(subject.model))}

    return run


def _by_genai(
    path: Path,
) -> tuple[tuple[str, ...], Callable[[list[int], int], list[int]] | None]:
    """GenAI's own loop; only a note where it is not installed."""
    try:
        importlib.import_module("onnxruntime_genai")
    except ImportError:
        return (
            "onnxruntime_genai is not installed: the graph was run with onnxruntime, and its loop "
            "was not; pip install 'fxshare[ort-genai]'",
        ), None

    def generate(prompt: list[int], new: int) -> list[int]:
        try:
            _, run = ort_genai({"path": str(path), "prompts": [prompt], "new": new})
            tokens, _ = run()
        except Exception as error:
            raise ExportError(onnx.reason("onnxruntime_genai refuses the model", error)) from error
        return tokens[0]

    return (), generate


__all__ = ["CONFIG", "GRAPH", "GivenCache", "ours", "write"]
