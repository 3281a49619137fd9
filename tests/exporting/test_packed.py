"""Dense weights in few bits in a folder of transformers, in the format of compressed-tensors."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare import Plan
from fxshare.errors import CheckFailed
from fxshare.exporting import packed
from tests.compiling.narrowed import batches
from tests.compiling.test_bits import outputs, pair
from tests.strategies import no_warnings_of_ours
from tests.toys import VOCABULARY


def llama(hidden: int = 64) -> nn.Module:
    import transformers as tf

    some = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": VOCABULARY}
    sizes = {"hidden_size": hidden, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **heads, **some)).eval()


@functools.cache
def rounded(bits: tuple[int, ...], hidden: int = 64) -> tuple[nn.Module, Any]:
    """A model, and it with all matched weights dense, in these widths by turns."""
    original = llama(hidden)
    cfg = fxshare.init(original)
    plain = json.loads(fxshare.plan(original, cfg).to_json())
    names = [s["name"] for site in plain["sites"] for s in site["slices"]]
    entries = [{"bits": b, "slices": names[at :: len(bits)]} for at, b in enumerate(bits)]
    plan = Plan.from_json(json.dumps({**plain, "mode": "planned", "rounded": entries}))
    planned = [cfg, {"budget": {"params_kept": 0.9}}]
    with no_warnings_of_ours():
        return original, fxshare.compile(original, planned, calibration=batches(), plan=plan)


def unpacked(words: Tensor, bits: int, width: int) -> Tensor:
    """As compressed-tensors reads them, one after the other."""
    rows = []
    for row in words.tolist():
        whole = b"".join(int(word & 0xFFFFFFFF).to_bytes(4, "little") for word in row)
        number = int.from_bytes(whole, "little")
        mask = (1 << bits) - 1
        rows.append([((number >> (bits * at)) & mask) - (1 << (bits - 1)) for at in range(width)])
    return torch.tensor(rows)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [1, 8, 33])
def test_words_hold_the_codes_in_order(bits: int, width: int) -> None:
    least = -(1 << (bits - 1))
    codes = torch.randint(least, -least, (5, width), dtype=torch.int8)
    codes[0] = -least - 1  # all bits of a word
    words = packed.packed_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (5, -(-width * bits // 32))
    assert torch.equal(unpacked(words, bits, width), codes.long())


@pytest.mark.parametrize("bits", [(8,), (4,), (8, 4)])
def test_transformers_loads_the_codes(bits: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    import transformers as tf
    from safetensors.torch import load_file

    original, gm = rounded(bits)
    made = fxshare.export(fxshare.lower(gm), tmp_path / "there", to="dense")
    assert made.distance is not None
    assert made.distance.relative <= made.limit
    assert made.notes == ("7 weights are codes (compressed-tensors, pack-quantized)",)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    torch.testing.assert_close(outputs(loaded), outputs(gm), rtol=1e-5, atol=1e-5)
    assert (outputs(gm) - outputs(original)).abs().max() > 1e-4
    # counted: words of all codes, scales in float32, shapes; the rest as it was
    tensors = load_file(tmp_path / "there" / "model.safetensors")
    words = sum(t.nbytes for name, t in tensors.items() if name.endswith("weight_packed"))
    numbers = gm.fxshare.plan.dense_numbers
    assert words == numbers * sum(bits) // len(bits) // 8 or len(bits) > 1
    scheme = json.loads((tmp_path / "there" / "config.json").read_text())["quantization_config"]
    assert scheme["ignore"] == ["lm_head"]
    found = [group["weights"]["num_bits"] for group in scheme["config_groups"].values()]
    assert found == list(bits)


def test_words_in_a_wrong_order_are_caught(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("compressed_tensors")
    right = packed.packed_words
    monkeypatch.setattr(packed, "packed_words", lambda codes, bits: right(codes.flip(1), bits))
    with pytest.raises(CheckFailed, match="differs from the compiled model"):
        fxshare.export(rounded((8,))[1], tmp_path / "there", to="dense")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("compiled", "reason"),
    [
        (lambda: pair("gpt2", 8)[1], "is no dense weight"),
        (lambda: rounded((4,), 48)[1], "has 48 inputs, no multiple of 32"),
        (lambda: rounded((8,))[1], "is not installed; pip install 'fxshare"),
    ],
)
def test_what_cannot_be_codes_is_multiplied_out_and_said(
    compiled: Any, reason: str, tmp_path: Path, monkeypatch: Any
) -> None:
    import transformers as tf

    if "installed" in reason:
        monkeypatch.setattr(packed, "_PACKAGE", "fxshare_has_no_such_package")
    gm = compiled()
    made = fxshare.export(gm, tmp_path / "there", to="dense")
    (note,) = made.notes
    assert note.startswith("weights in few bits were multiplied out: ")
    assert reason in note
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    torch.testing.assert_close(outputs(loaded), outputs(gm), rtol=1e-5, atol=1e-5)
