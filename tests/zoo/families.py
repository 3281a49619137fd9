"""The families of the zoo: a random model, a call, and a configuration that matches its linears.

Sizes are tiny and uneven (head width 8, fewer key heads than query heads where the family allows
it), so that a mix-up of any two of them shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.toys import NanoGPT
from tests.zoo.measure import Subject
from tests.zoo.written import (
    HEADS,
    HIDDEN,
    LAYERS,
    LONGEST,
    VOCABULARY,
    WIDTH,
    ImageTransformer,
    MultiheadStack,
    PlainTransformer,
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": LONGEST,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True, eq=False)
class Family:
    """One architecture.

    ``inputs`` says what a call has: ``"ids"`` (with a mask where ``masked``), ``"pair"`` (source
    and target ids under the two names of ``names``), ``"images"`` or ``"sound"``.
    """

    name: str
    make: Callable[[], nn.Module]
    types: Mapping[str, Any]
    block_pattern: str
    inputs: str = "ids"
    names: tuple[str, ...] = ("input_ids",)
    masked: bool = False
    causal: bool = False
    vocabulary: int = VOCABULARY

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of exact mode."""
        types = {
            t: {"pattern": s} if isinstance(s, str) else dict(s) for t, s in self.types.items()
        }
        return {"weight_types": types, "block_pattern": self.block_pattern}

    def model(self, seed: int = 0) -> nn.Module:
        """The model in eval mode and float32. Weights have unit gain: with those of an untrained
        model attention is flat, and a mistake in it would drown in rounding."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make().eval()
            convolutions = {id(m.weight) for m in model.modules() if isinstance(m, _CONVOLUTIONS)}
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    centre = 0.5 if float(parameter.detach().mean()) > 0.5 else 0.0
                    nn.init.normal_(parameter, centre, 0.2)
                else:
                    of_kernel = id(parameter) in convolutions
                    inputs = parameter[0].numel() if of_kernel else parameter.shape[-1]
                    nn.init.normal_(parameter, 0.0, inputs**-0.5)
        return model

    def call(self, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Any]:
        """One call by name; where it is masked, the first row is padded on the left."""
        generator = torch.Generator().manual_seed(1000 + seed)
        if self.inputs == "images":
            return {self.names[0]: torch.randn(batch, 3, 32, 32, generator=generator)}
        if self.inputs == "sound":
            sound = torch.randn(batch, 8, 2 * 16, generator=generator)
            return {self.names[0]: sound, self.names[1]: self._ids(batch, length - 3, generator)}
        call: dict[str, Any] = {self.names[0]: self._ids(batch, length, generator)}
        if self.inputs == "pair":
            call[self.names[1]] = self._ids(batch, length - 3, generator)
        if self.masked:
            mask = torch.ones(batch, length, dtype=torch.long)
            mask[0, :3] = 0
            call["attention_mask"] = mask
        if self.causal and self.names[0] == "input_ids":
            call["use_cache"] = False
        return call

    def batches(self, count: int = 4, batch: int = 4, length: int = 16) -> list[dict[str, Any]]:
        """Calibration data."""
        calls = [self.call(batch, length, seed=10 + n) for n in range(count)]
        return [{k: v for k, v in call.items() if isinstance(v, Tensor)} for call in calls]

    def subject(self) -> Subject:
        """The family as something to measure."""
        return Subject(
            self.name,
            self.model(),
            self.config,
            self.call(),
            self.call(3, 9 if self.inputs != "sound" else 12, seed=5),
            list(self.batches()),
            self._ids(2, 5, torch.Generator().manual_seed(7)) if self.causal else None,
        )

    def _ids(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        return torch.randint(3, self.vocabulary, (batch, length), generator=generator)


def transformers_model(config: str, model: str, **values: Any) -> nn.Module:
    """A transformers model with random weights, by the names of its classes."""
    import transformers

    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**values))
    return made


def _causal(
    name: str, family: str, types: Mapping[str, Any], block_pattern: str, **values: Any
) -> Family:
    config = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"

    def make() -> nn.Module:
        return transformers_model(config, f"{family}ForCausalLM", **values)

    return Family(name, make, types, block_pattern, masked=True, causal=True)


_ATTENTION = {p: rf".*\.self_attn\.{p}_proj$" for p in "qkvo"}
_GATED = {p: rf".*\.mlp\.{p}_proj$" for p in ("gate", "up", "down")}
_LLAMA = _ATTENTION | _GATED
_EXPERTS = {
    "experts_gate_up": {"pattern": r".*\.experts\.gate_up_proj$", "split": "gate_up"},
    "experts_down": r".*\.experts\.down_proj$",
}
_LAYERS = r"layers\.(\d+)"
_BY_HEAD = {"split": "heads", "qkv_order": "qkv", "n_head": HEADS}


def _llama(name: str, family: str, **values: Any) -> Family:
    return _causal(name, family, _LLAMA, _LAYERS, **{**_COMMON, **_TOKENS, **values})


def _gpt2() -> nn.Module:
    return transformers_model(
        "GPT2Config",
        "GPT2LMHeadModel",
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=LONGEST,
        bos_token_id=1,
        eos_token_id=2,
    )


def _bert() -> nn.Module:
    return transformers_model("BertConfig", "BertForMaskedLM", **_COMMON, pad_token_id=0)


def _vit() -> nn.Module:
    sizes = {k: v for k, v in _COMMON.items() if k not in ("vocab_size", "max_position_embeddings")}
    return transformers_model("ViTConfig", "ViTModel", **sizes, image_size=32, patch_size=8)


def _clip() -> nn.Module:
    return transformers_model("CLIPTextConfig", "CLIPTextModel", **_COMMON, **_TOKENS)


def _t5() -> nn.Module:
    return transformers_model(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )


def _whisper() -> nn.Module:
    return transformers_model(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        max_source_positions=16,
        max_target_positions=LONGEST,
        decoder_start_token_id=1,
        **_TOKENS,
    )


_T5_TYPES = {
    **{f"enc_{p}": rf"encoder\..*\.SelfAttention\.{p}$" for p in "qkvo"},
    **{f"dec_{p}": rf"decoder\..*\.SelfAttention\.{p}$" for p in "qkvo"},
    **{f"cross_{p}": rf"decoder\..*\.EncDecAttention\.{p}$" for p in "qkvo"},
    **{f"enc_{p}": rf"encoder\..*\.DenseReluDense\.{p}$" for p in ("wi", "wo")},
    **{f"dec_{p}": rf"decoder\..*\.DenseReluDense\.{p}$" for p in ("wi", "wo")},
}
_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
_WHISPER_TYPES = {
    **{f"enc_{p}": rf".*encoder\..*\.self_attn\.{n}$" for p, n in _PROJECTIONS.items()},
    **{f"dec_{p}": rf".*decoder\..*\.self_attn\.{n}$" for p, n in _PROJECTIONS.items()},
    **{f"cross_{p}": rf".*decoder\..*\.encoder_attn\.{n}$" for p, n in _PROJECTIONS.items()},
    **{f"enc_{p}": rf".*encoder\..*\.{p}$" for p in ("fc1", "fc2")},
    **{f"dec_{p}": rf".*decoder\..*\.{p}$" for p in ("fc1", "fc2")},
}
_MLP_1_2 = {p: rf".*\.mlp\.{p}$" for p in ("fc1", "fc2")}

FAMILIES = (
    Family(
        "gpt2",
        _gpt2,
        {
            "attn": {"pattern": r".*\.attn\.c_attn$", **_BY_HEAD},
            "proj": r".*\.attn\.c_proj$",
            "fc": r".*\.mlp\.c_fc$",
            "down": r".*\.mlp\.c_proj$",
        },
        r"h\.(\d+)",
        masked=True,
        causal=True,
    ),
    _causal(
        "opt",
        "OPT",
        {p: rf".*\.self_attn\.{n}$" for p, n in _PROJECTIONS.items()}
        | {p: rf".*\.{p}$" for p in ("fc1", "fc2")},
        _LAYERS,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        ffn_dim=HIDDEN,
        max_position_embeddings=LONGEST,
        word_embed_proj_dim=WIDTH,
        **_TOKENS,
    ),
    _llama("llama", "Llama", num_key_value_heads=2),
    _llama("mistral", "Mistral", num_key_value_heads=2, sliding_window=8),
    _llama("qwen2", "Qwen2", num_key_value_heads=2),
    _llama("qwen3", "Qwen3", num_key_value_heads=2, head_dim=8),
    _llama("gemma", "Gemma", num_key_value_heads=1, head_dim=8),
    _llama("gemma2", "Gemma2", num_key_value_heads=2, head_dim=8, sliding_window=8),
    _llama("gemma3", "Gemma3", num_key_value_heads=2, head_dim=8, sliding_window=8),
    _causal(
        "phi3",
        "Phi3",
        {
            "qkv": {
                "pattern": r".*\.self_attn\.qkv_proj$",
                "split": "heads",
                "qkv_order": "qkv",
                "n_head": HEADS,
                "n_kv_head": 2,
            },
            "o": r".*\.self_attn\.o_proj$",
            "gate_up": {"pattern": r".*\.mlp\.gate_up_proj$", "split": "gate_up"},
            "down": r".*\.mlp\.down_proj$",
        },
        _LAYERS,
        **_COMMON,
        **_TOKENS,
        num_key_value_heads=2,
    ),
    _causal(
        "gpt_neox",
        "GPTNeoX",
        {
            "qkv": {"pattern": r".*\.attention\.query_key_value$", **_BY_HEAD, "interleaved": True},
            "o": r".*\.attention\.dense$",
            "fc": r".*\.mlp\.dense_h_to_4h$",
            "down": r".*\.mlp\.dense_4h_to_h$",
        },
        _LAYERS,
        **_COMMON,
        **_TOKENS,
    ),
    _causal(
        "falcon",
        "Falcon",
        {
            "qkv": {
                "pattern": r".*\.self_attention\.query_key_value$",
                **_BY_HEAD,
                "n_kv_head": 1,
            },
            "o": r".*\.self_attention\.dense$",
            "fc": r".*\.mlp\.dense_h_to_4h$",
            "down": r".*\.mlp\.dense_4h_to_h$",
        },
        r"h\.(\d+)",
        **_COMMON,
        **_TOKENS,
    ),
    _causal(
        "falcon_grouped",
        "Falcon",
        {
            "qkv": {
                "pattern": r".*\.self_attention\.query_key_value$",
                **_BY_HEAD,
                "n_kv_head": 2,
                "interleaved": True,
            },
            "o": r".*\.self_attention\.dense$",
            "fc": r".*\.mlp\.dense_h_to_4h$",
            "down": r".*\.mlp\.dense_4h_to_h$",
        },
        r"h\.(\d+)",
        **_COMMON,
        **_TOKENS,
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    _causal(
        "bloom",
        "Bloom",
        {
            "qkv": {
                "pattern": r".*\.self_attention\.query_key_value$",
                **_BY_HEAD,
                "interleaved": True,
            },
            "o": r".*\.self_attention\.dense$",
            "fc": r".*\.mlp\.dense_h_to_4h$",
            "down": r".*\.mlp\.dense_4h_to_h$",
        },
        r"h\.(\d+)",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        **_TOKENS,
    ),
    _causal(
        "mixtral",
        "Mixtral",
        _ATTENTION | _EXPERTS,
        _LAYERS,
        **_COMMON,
        **_TOKENS,
        num_key_value_heads=2,
        num_local_experts=4,
    ),
    _causal(
        "qwen2_moe",
        "Qwen2Moe",
        _ATTENTION
        | _EXPERTS
        | {"router": r".*\.mlp\.gate\.weight$"}
        | {p: rf".*\.shared_expert\.{p}_proj$" for p in ("gate", "up", "down")},
        _LAYERS,
        **_COMMON,
        **_TOKENS,
        num_key_value_heads=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_experts=5,
        num_experts_per_tok=2,
    ),
    _causal(
        "gpt_oss",
        "GptOss",
        {
            **_ATTENTION,
            # gate and up alternate, row by row: no two halves
            "experts_gate_up": r".*\.experts\.gate_up_proj$",
            "experts_down": r".*\.experts\.down_proj$",
        },
        _LAYERS,
        **_COMMON,
        **_TOKENS,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        sliding_window=8,
    ),
    Family(
        "bert",
        _bert,
        {p: rf".*\.attention\.self\.{p}$" for p in ("query", "key", "value")}
        | {
            "o": r".*\.attention\.output\.dense$",
            "fc": r".*\.intermediate\.dense$",
            "down": r".*\.layer\.\d+\.output\.dense$",
        },
        r"layer\.(\d+)",
        masked=True,
    ),
    Family(
        "vit",
        _vit,
        {p: rf".*\.attention\.{p}$" for p in ("q_proj", "k_proj", "v_proj", "o_proj")} | _MLP_1_2,
        _LAYERS,
        inputs="images",
        names=("pixel_values",),
    ),
    Family(
        "clip_text",
        _clip,
        {p: rf".*\.self_attn\.{n}$" for p, n in _PROJECTIONS.items()} | _MLP_1_2,
        _LAYERS,
        masked=True,
    ),
    Family(
        "t5",
        _t5,
        _T5_TYPES,
        r"block\.(\d+)",
        inputs="pair",
        names=("input_ids", "decoder_input_ids"),
        masked=True,
    ),
    Family(
        "whisper",
        _whisper,
        _WHISPER_TYPES,
        _LAYERS,
        inputs="sound",
        names=("input_features", "decoder_input_ids"),
    ),
    Family(
        "nanogpt",
        lambda: NanoGPT(LAYERS, block_size=LONGEST),
        {
            "attn": {"pattern": r".*\.attn\.c_attn$", **_BY_HEAD},
            "proj": r".*\.attn\.c_proj$",
            "fc": r".*\.mlp\.c_fc$",
            "down": r".*\.mlp\.c_proj$",
        },
        r"h\.(\d+)",
        names=("idx",),
        vocabulary=32,
    ),
    Family(
        "nn_transformer",
        PlainTransformer,
        {
            "enc_qkv": {"pattern": r".*\.encoder\..*\.in_proj_weight$", **_BY_HEAD},
            "dec_qkv": {"pattern": r".*\.decoder\..*self_attn\.in_proj_weight$", **_BY_HEAD},
            "cross_qkv": {"pattern": r".*\.multihead_attn\.in_proj_weight$", **_BY_HEAD},
            "enc_o": r".*\.encoder\..*\.out_proj$",
            "dec_o": r".*\.decoder\..*self_attn\.out_proj$",
            "cross_o": r".*\.multihead_attn\.out_proj$",
            "enc_1": r".*\.encoder\..*\.linear1$",
            "enc_2": r".*\.encoder\..*\.linear2$",
            "dec_1": r".*\.decoder\..*\.linear1$",
            "dec_2": r".*\.decoder\..*\.linear2$",
        },
        _LAYERS,
        inputs="pair",
        names=("src", "tgt"),
    ),
    Family(
        "nn_multihead",
        MultiheadStack,
        {
            "qkv": {"pattern": r".*\.attn\.in_proj_weight$", **_BY_HEAD},
            "o": r".*\.attn\.out_proj$",
            "fc": r"layers\.\d+\.fc$",
        },
        _LAYERS,
        names=("ids",),
    ),
    Family(
        "timm_vit",
        ImageTransformer,
        {
            "qkv": {"pattern": r".*\.attn\.qkv$", **_BY_HEAD},
            "proj": r".*\.attn\.proj$",
            **_MLP_1_2,
        },
        r"blocks\.(\d+)",
        inputs="images",
        names=("x",),
    ),
)


def family(name: str) -> Family:
    """The family of that name."""
    return next(one for one in FAMILIES if one.name == name)
