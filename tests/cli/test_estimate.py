"""``fxshare estimate``: shapes, folders of which the configuration is enough, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

pytest.importorskip("transformers")

Run = Callable[..., Ran]
SHAPE = "64,2,4,160,257"
QUICK = ("--tokens", "512", "--length", "64", "--device", "h100")


def test_a_shape_is_enough(fxshare: Run) -> None:
    ran = fxshare("estimate", SHAPE, "--keep", "0.8", *QUICK, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["mode"] == "planned"
    assert ran.json["sites"] == 14
    assert ran.json["tokens"] == 512
    assert ran.json["seconds"] == pytest.approx(sum(s["seconds"] for s in ran.json["stages"]))
    assert ran.json["fits"] is True
    assert "no -c: the configuration that 'fxshare init' finds in the model, 7 weight" in ran.err


def test_the_text_has_every_stage_and_says_what_it_rests_on(fxshare: Run) -> None:
    ran = fxshare("estimate", SHAPE, "--keep", "0.8", *QUICK, "--work", "--max-memory", "20MB")
    assert ran.code == 0, ran.err
    for stage in ("calibrate", "spectra", "judge", "verify", "total"):
        assert f"\n{stage} " in ran.out
    assert "in the work folder" in ran.out
    assert "does not fit: it takes at least" in ran.out
    assert "h100: an estimate from published peak rates, not measured" in ran.out


def test_of_a_folder_the_configuration_is_enough(fxshare: Run, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=160,
        vocab_size=257,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path / "bare")
    ran = fxshare("estimate", str(tmp_path / "bare"), "--keep", "0.8", *QUICK, "--json")
    assert ran.code == 0, ran.err
    shape = fxshare("estimate", SHAPE, "--keep", "0.8", *QUICK, "--json")
    assert ran.json["parameters"] == shape.json["parameters"]
    assert ran.json["disk"] == shape.json["disk"]  # in the dtype that it names
    path = tmp_path / "bare" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_attention_heads": -1}))
    ran = fxshare("estimate", str(tmp_path / "bare"), *QUICK)
    assert ran.code == 1
    assert "transformers cannot make the model of this config.json" in ran.err


def test_a_model_of_ones_own(fxshare: Run) -> None:
    ran = fxshare("estimate", "cli_toy:make", "-c", "sharing.yaml", *QUICK, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["mode"] == "sharing"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("gpt9",), "'gpt9' is not a model"),
        (("64,2,4,160",), "error: shape: expected gpt2"),
        ((SHAPE, "--tokens", "0"), "tokens: expected a number of at least 1, found 0"),
        ((SHAPE, "--dtype", "int8"), "--dtype: expected one of float32"),
        ((SHAPE, "--device", "abacus"), "--device: expected one of cpu, cuda, a100"),
    ],
)
def test_refusals(options: tuple[str, ...], reason: str, fxshare: Run) -> None:
    ran = fxshare("estimate", *options)
    assert ran.code == 2
    assert reason in ran.err


def test_a_result_that_the_disk_has_no_room_for_is_refused_first(
    fxshare: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    command = ("compile", "cli_toy:make", "-c", "sharing.yaml", "-o", str(tmp_path / "out"))
    ran = fxshare(*command)
    assert ran.code == 1
    assert "of the result go there, and 0 MB are free; give -o a folder on a larger" in ran.err
    assert "match: started" not in ran.err
    assert not (tmp_path / "out").exists()
