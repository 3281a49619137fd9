"""lm-evaluation-harness takes a compiled graph for a model, as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.generation.models import pair
from tests.zoo.written import VOCABULARY

WORDS = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(3, VOCABULARY))]
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    },
    "continue": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["w5"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def documents(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(
            f"w{n}" for n in torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()
        )

    path = folder / "documents.jsonl"
    lines = [
        {"text": words(3 + n % 4), "choices": [words(2), words(3)], "label": n % 2}
        for n in range(6)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


@pytest.mark.slow
def test_scores_as_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(documents(tmp_path))},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "text",
    }
    tasks = [
        ConfigurableTask(config={"task": name, **common, **task}) for name, task in TASKS.items()
    ]
    found = [
        lm_eval.simple_evaluate(
            HFLM(pretrained=one, tokenizer=tokenizer(), batch_size=2, max_length=64),
            tasks=tasks,
            log_samples=True,
            # its own tasks are thousands of files to read
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
        for one in pair("llama")
    ]
    original, ours = ({name: f["samples"][name] for name in TASKS} for f in found)
    for a, b in zip(original["choose"], ours["choose"], strict=True):
        for (left, _), (right, _) in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
            assert float(left) == pytest.approx(float(right), rel=1e-4)
    texts = [[s["resps"][0][0] for s in one["continue"]] for one in (original, ours)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
