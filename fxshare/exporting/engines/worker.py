"""Greedy tokens of one engine: a program of its own, which needs that engine and nothing of ours.

::

    python worker.py <job.json

The job has ``engine``, ``path``, ``dtype``, ``prompts`` (lists of token ids) and ``new``; for
``pt2`` and ``onnx`` also ``inputs`` (the names of the arguments), and ``rows`` and ``width`` where
they are fixed. The last line of its output is the answer: ``version``, ``tokens``, ``logits`` (of
each token), ``seconds`` and ``resident`` bytes; or ``missing``, what cannot be imported.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Said = tuple[list[list[int]], list[list[float]]]
_MASK = "attention_mask"


def transformers(job: Mapping[str, Any]) -> tuple[str, Callable[[], Said]]:
    """``generate`` with the cache, by the code of the folder."""
    torch: Any = importlib.import_module("torch")
    library: Any = importlib.import_module("transformers")
    model = library.AutoModelForCausalLM.from_pretrained(
        job["path"], trust_remote_code=True, local_files_only=True, dtype="auto"
    ).eval()

    def run() -> Said:
        tokens, logits = [], []
        for prompt in job["prompts"]:
            ids = torch.tensor([prompt])
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=job["new"],
                min_new_tokens=job["new"],
                do_sample=False,
                num_beams=1,
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            tokens.append(found.sequences[0, len(prompt) :].tolist())
            logits.append(
                [float(row[0, token]) for row, token in zip(found.logits, tokens[-1], strict=True)]
            )
        return tokens, logits

    return library.__version__, run


def vllm(job: Mapping[str, Any]) -> tuple[str, Callable[[], Said]]:
    """vLLM's transformers backend, on whatever device it finds, by the code of the folder."""
    return _vllm(job, plugin="", trust_remote_code=True, model_impl="transformers")


def vllm_plugin(job: Mapping[str, Any]) -> tuple[str, Callable[[], Said]]:
    """The same by the plugin of an fxshare that is installed there; no code of the folder runs."""
    importlib.import_module("fxshare")
    return _vllm(job, plugin="fxshare")


def _vllm(job: Mapping[str, Any], *, plugin: str, **options: Any) -> tuple[str, Callable[[], Said]]:
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # a bound core may be another process's
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    os.environ["VLLM_PLUGINS"] = plugin
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    library: Any = importlib.import_module("vllm")
    longest = max(map(len, job["prompts"])) + job["new"]
    model = library.LLM(
        model=job["path"],
        skip_tokenizer_init=True,
        dtype=job["dtype"],  # of its own accord it makes float32 half as wide
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=4,
        max_num_batched_tokens=max(128, longest),
        logprobs_mode="raw_logits",
        **options,
    )

    def run() -> Said:
        sampling = library.SamplingParams(
            temperature=0, max_tokens=job["new"], detokenize=False, ignore_eos=True, logprobs=0
        )
        given = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        found = [answer.outputs[0] for answer in model.generate(given, sampling, use_tqdm=False)]
        tokens = [list(each.token_ids) for each in found]
        logits = [
            [row[token].logprob for row, token in zip(each.logprobs, own, strict=True)]
            for each, own in zip(found, tokens, strict=True)
        ]
        return tokens, logits

    return library.__version__, run


def ort_genai(job: Mapping[str, Any]) -> tuple[str, Callable[[], Said]]:
    """ONNX Runtime GenAI's loop, with its cache."""
    library: Any = importlib.import_module("onnxruntime_genai")
    path = Path(job["path"])
    size = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))["model"][
        "vocab_size"
    ]
    told = {token for prompt in job["prompts"] for token in prompt}

    def loaded(said: set[int]) -> Any:
        """It ends at a token that none of the texts has: at the model's own it would stop, and
        with ``min_length`` never say it."""
        config = library.Config(str(path))
        end = next((token for token in range(size - 1, -1, -1) if token not in said), size - 1)
        config.overlay(json.dumps({"model": {"eos_token_id": end}}))
        return library.Model(config)

    model = loaded(told)

    def answer(prompt: list[int], model: Any) -> tuple[list[int], list[float]]:
        params = library.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + job["new"])
        generator = library.Generator(model, params)
        generator.append_tokens(prompt)
        tokens: list[int] = []
        logits: list[float] = []
        while len(tokens) < job["new"] and not generator.is_done():
            last = generator.get_logits()[0, -1]
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            logits.append(float(last[tokens[-1]]))
        return tokens, logits

    def run() -> Said:
        found = []
        for prompt in job["prompts"]:
            tokens, logits = answer(prompt, model)
            if len(tokens) < job["new"]:  # it was said after all
                tokens, logits = answer(prompt, loaded({*prompt, *tokens}))
            found.append((tokens, logits))
        return [tokens for tokens, _ in found], [logits for _, logits in found]

    return library.__version__, run


def pt2(job: Mapping[str, Any]) -> tuple[str, Callable[[], Said]]:
    """``torch.export.load``: the whole text anew for every token."""
    torch: Any = importlib.import_module("torch")
    model = torch.export.load(job["path"]).module()

    def logits_of(call: Mapping[str, list[list[int]]]) -> Any:
        with torch.no_grad():
            output = model(**{name: torch.tensor(rows) for name, rows in call.items()})
        while not isinstance(output, torch.Tensor):
            output = output["logits"] if isinstance(output, dict) else output[0]
        return output.float().numpy()

    return torch.__version__, lambda: _by_texts(job, logits_of)


def onnx(job: Mapping[str, Any]) -> tuple[str, Callable[[], Said]]:
    """onnxruntime: the whole text anew for every token."""
    numpy: Any = importlib.import_module("numpy")
    library: Any = importlib.import_module("onnxruntime")
    session = library.InferenceSession(job["path"], providers=["CPUExecutionProvider"])
    kinds = {"tensor(int64)": numpy.int64, "tensor(int32)": numpy.int32, "tensor(bool)": bool}
    read = {put.name: kinds[put.type] for put in session.get_inputs()}
    outputs = [put.name for put in session.get_outputs()]
    wanted = "logits" if "logits" in outputs else outputs[0]

    def logits_of(call: Mapping[str, list[list[int]]]) -> Any:
        feed = {name: numpy.array(call[name], dtype=kind) for name, kind in read.items()}
        return session.run([wanted], feed)[0]

    return library.__version__, lambda: _by_texts(job, logits_of)


def _by_texts(job: Mapping[str, Any], logits_of: Callable[[Mapping[str, Any]], Any]) -> Said:
    """Of a graph that takes whole texts: filled up on the right and repeated where its sizes are
    fixed, which a causal model does not see."""
    ids = next(name for name in job["inputs"] if name != _MASK)
    tokens: list[list[int]] = []
    logits: list[list[float]] = []
    for prompt in job["prompts"]:
        text = list(prompt)
        logits.append([])
        for _ in range(job["new"]):
            filled = text + [0] * ((job["width"] or 0) - len(text))
            rows = job["rows"] or 1
            call = {ids: [filled] * rows}
            if _MASK in job["inputs"]:
                call[_MASK] = [[1] * len(filled)] * rows
            last = logits_of(call)[0, len(text) - 1]
            text.append(int(last.argmax()))
            logits[-1].append(float(last[text[-1]]))
        tokens.append(text[len(prompt) :])
    return tokens, logits


ENGINES = {
    "transformers": transformers,
    "vllm": vllm,
    "vllm-plugin": vllm_plugin,
    "ort-genai": ort_genai,
    "pt2": pt2,
    "onnx": onnx,
}


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def main() -> None:
    """Answer one job."""
    job = json.load(sys.stdin)
    try:
        version, run = ENGINES[job["engine"]](job)
    except ModuleNotFoundError as error:
        print(json.dumps({"missing": str(error.name)}))
        return
    started = time.perf_counter()
    tokens, logits = run()
    seconds = time.perf_counter() - started
    answer = {"version": version, "tokens": tokens, "logits": logits, "seconds": seconds}
    print(json.dumps({**answer, "resident": resident()}), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # some engines crash on their way out, after the answer
