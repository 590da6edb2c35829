"""The processes of serving.py: a model behind stdin and stdout, one JSON command and one JSON answer a line.

    python serving_contestants.py finback|transformers|llama.cpp MODEL SETTING

A command {"rows", "prompt", "new"} asks for `new` greedy tokens on each of `rows` different prompts of `prompt` tokens; the
answer has the seconds until every row had its first token, and until all were done. This file runs without finback in
the path of the others, so that llama.cpp may live in a Python of its own.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = tuple[float, float]
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def prompts(rows: int, length: int, vocab: int) -> list[list[int]]:
    """Different from the first token on, so that nobody finds a prefix in a cache."""
    return [[(101 + 7919 * row + 31 * i) % (vocab - 200) + 100 for i in range(length)] for row in range(rows)]


def finback(model: str, setting: str) -> Callable[[int, int, int], Answer]:
    import torch

    from finback.checkpoint import inference
    from finback.engine.engine import Engine, EngineConfig
    from finback.engine.request import SamplingParams

    torch.set_num_threads(THREADS)
    loaded = moe(setting) if model == "moe" else inference.load_for_inference(Path(model), setting)  # type: ignore[arg-type]

    def work(rows: int, prompt: int, new: int) -> Answer:
        engine = Engine(loaded, (), EngineConfig(rows=rows, tokens=rows * (prompt + new + 32), chunk=512))
        began = time.perf_counter()
        asked = prompts(rows, prompt, loaded.config.vocab_size)
        requests = [engine.submit(p, SamplingParams(0.0, new), 0) for p in asked]
        while engine.busy:
            engine.step()
        return max(s.first for s in requests) - began, time.perf_counter() - began

    return work


def moe(setting: str) -> Any:
    """A V3-style mixture of experts of about 100 M parameters with random weights."""
    import torch

    from finback.model.config import ModelConfig
    from finback.model.pack import pack
    from finback.model.transformer import Transformer

    config = ModelConfig(
        vocab_size=16384,
        hidden_size=512,
        num_hidden_layers=10,
        num_attention_heads=8,
        intermediate_size=1376,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=32,
        n_shared_experts=1,
        num_experts_per_tok=4,
        moe_intermediate_size=192,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        max_position_embeddings=2048,
        initializer_range=0.03,
    )
    model = Transformer(config).initialise(0)
    if setting != "bf16":
        return model.eval()
    narrow = Transformer(config, torch.bfloat16, torch.bfloat16).eval()
    narrow.load_state_dict(model.state_dict())
    return pack(narrow, "bf16")


def transformers(model: str, setting: str) -> Callable[[int, int, int], Answer]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(THREADS)
    dtype = torch.bfloat16 if setting == "bf16" else torch.float32
    if model == "moe":
        from twin import twin

        loaded = twin(moe("fp32")).to(dtype).eval()
    else:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    def generate(asked: list[list[int]], new: int) -> float:
        ids = torch.tensor(asked)
        began = time.perf_counter()
        with torch.inference_mode():
            out = loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )
        assert out.shape == (len(asked), len(asked[0]) + new)
        return time.perf_counter() - began

    def work(rows: int, prompt: int, new: int) -> Answer:
        asked = prompts(rows, prompt, loaded.config.vocab_size)
        return generate(asked, 1), generate(asked, new)

    return work


def llama(model: str, setting: str) -> Callable[[int, int, int], Answer]:
    import llama_cpp as lib
    import numpy as np

    form = {"bf16": 32, "f16": 1, "q8_0": 7}[setting]
    target = f"{model}.{setting}.gguf"
    if not Path(target).is_file():
        options = lib.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize, options.nthread = form, True, THREADS
        assert lib.llama_model_quantize(model.encode(), target.encode(), ctypes.byref(options)) == 0
    loaded = lib.llama_model_load_from_file(target.encode(), lib.llama_model_default_params())
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded))

    def work(rows: int, prompt: int, new: int) -> Answer:
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified = rows * (prompt + new + 32), rows, True
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = THREADS
        context = lib.llama_init_from_model(loaded, options)
        assert context
        batch = lib.llama_batch_init(max(512, rows), 0, 1)

        def add(token: int, position: int, row: int, wanted: bool) -> None:
            n = batch.n_tokens
            batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, position, 1
            batch.seq_id[n][0], batch.logits[n] = row, wanted
            batch.n_tokens = n + 1

        def best(place: int) -> int:
            logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, place), shape=(vocab,))
            return int(logits.argmax())

        began = time.perf_counter()
        last = [0] * rows
        places: dict[int, int] = {}

        def read() -> None:
            assert lib.llama_decode(context, batch) == 0
            for row, place in places.items():
                last[row] = best(place)
            batch.n_tokens = 0
            places.clear()

        for row, tokens in enumerate(prompts(rows, prompt, vocab)):
            for i, token in enumerate(tokens):
                if batch.n_tokens == 512:
                    read()
                if i == prompt - 1:
                    places[row] = batch.n_tokens
                add(token, i, row, i == prompt - 1)
        read()
        first = time.perf_counter() - began
        for step in range(new - 1):
            for row in range(rows):
                places[row] = batch.n_tokens
                add(last[row], prompt + step, row, True)
            read()
        took = time.perf_counter() - began
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return first, took

    return work


def main() -> None:
    kind, model, setting = sys.argv[1:]
    with open(os.dup(1), "w") as answers:  # noqa: PTH123 - a descriptor
        os.dup2(2, 1)  # whatever a library prints must not look like an answer
        work = {"finback": finback, "transformers": transformers, "llama.cpp": llama}[kind](model, setting)
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            first, total = work(asked["rows"], asked["prompt"], asked["new"])
            print(json.dumps({"first": first, "total": total}), file=answers, flush=True)


if __name__ == "__main__":
    main()
