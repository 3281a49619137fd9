"""Which classes of transformers a served model derives from, and which models have none."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from fxshare.errors import ExportError
from fxshare.exporting.subject import Subject
from fxshare.models.quantised import quantisation_of, refusal_of_quantised
from fxshare.models.structure import structure_of

PREFIX = "model"
"""Under which engines look for the base model's weights."""
_AUTO = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}


@dataclass(frozen=True, eq=False)
class Family:
    """``model`` is the original without values. ``auto`` is the auto class that makes one of its
    class, ``AutoModel`` where it is a base model itself. ``inside`` is what names of the base model
    begin with in the original's state dict (``transformer.``), empty for a base model."""

    model: Any
    base: type
    auto: str
    inside: str

    @property
    def config(self) -> type:
        """The class of the configuration."""
        return type(self.model.config)

    @property
    def generates(self) -> bool:
        """Whether it is a causal language model."""
        return self.auto == "AutoModelForCausalLM"

    def stored(self, name: str) -> str:
        """The name in the files of a tensor of the original's state dict: the base model's under
        ``model.``, where that is their name, and else as in the base model itself, which
        transformers and vLLM both complete."""
        if self.inside and self.inside != f"{PREFIX}.":
            return name.removeprefix(self.inside)
        return name


def family_of(subject: Subject) -> Family:
    """The classes of a compiled model's original.

    Raises :class:`ExportError` with the reason for which engines would not run it.
    """
    structure = structure_of(subject.model)
    if structure is None or not type(structure.model).__module__.startswith("transformers."):
        raise ExportError(
            f"to='vllm' writes a subclass of a model class of transformers, and {subject.name} is "
            "of a class of its own, which no engine has; export it to 'pt2' or 'onnx'"
        )
    model = structure.model
    _check_engines_take(subject.name, model)
    base = model.base_model
    auto = "AutoModel" if base is model else _auto_of(type(model).__name__)
    if auto is None:
        raise ExportError(
            f"to='vllm': no auto class of transformers makes a {subject.name}; expected a base "
            f"model or a class for {', '.join(sorted(_AUTO))}"
        )
    inside = "" if base is model else f"{model.base_model_prefix}."
    return Family(model, type(base), auto, inside)


def _check_engines_take(name: str, model: Any) -> None:
    config = model.config
    method = quantisation_of(config)
    if method is not None:
        raise ExportError(refusal_of_quantised(name, method))
    if config.is_encoder_decoder:
        raise ExportError(
            f"to='vllm': {name} has an encoder and a decoder, and vLLM's transformers backend runs "
            "one of them; expected a decoder or an encoder. Export it to 'pt2' or 'onnx'"
        )
    if config.get_text_config() is not config:
        raise ExportError(
            f"to='vllm': {name} is made of several models (configuration "
            f"{type(config).__name__}); expected one of text alone: compile its language model"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ExportError(
            f"to='vllm': the attention of {name} computes by itself and not by the attention "
            "interface of transformers (_supports_attention_backend is not set), so an engine "
            "cannot put its own cache there. Export it to 'pt2' or 'onnx', or to 'dense' for "
            "engines that have the original built in"
        )


def _auto_of(class_name: str) -> str | None:
    known: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    for auto, mapping in _AUTO.items():
        for names in getattr(known, mapping).values():
            if class_name == names or (isinstance(names, (tuple, list)) and class_name in names):
                return auto
    return None
