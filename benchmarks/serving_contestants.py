"""The processes of serving.py: a model behind stdin and stdout, one JSON command and one JSON answer per line.

    python serving_contestants.py finback|transformers|llama.cpp MODEL SETTING

A command {"rows", "prompt", "new"} asks for `new` greedy tokens on each of `rows` different prompts of `prompt` tokens;
the answer has the seconds until every row had its first token, and until all were done. The other contestants do not
import finback, so that llama.cpp (the xllamacpp wheel) may be in a separate Python.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

Answer = tuple[float, float]
MOST = 32  # rows
VOCABULARY = 49152  # of SmolLM2, and of files written with its vocabulary
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def prompts(rows: int, length: int, vocab: int) -> list[list[int]]:
    """Different from the first token on, so that no prefix is cached."""
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
    """llama.cpp's server in this process, which gets all rows at once from as many threads; `setting` is only a name."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_parallel, options.n_ctx = model, MOST, MOST * 256
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = THREADS
    server = xllamacpp.Server(options)

    def ask(prompt: list[int], new: int) -> Answer:
        """The times of the first token, by the server's clock, and of the last."""
        body = {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        headers = {"Content-Type": "application/json"}
        request = Request(f"{server.listening_address}/completion", json.dumps(body).encode(), headers)
        timings = json.load(urlopen(request))["timings"]
        assert timings["predicted_n"] == new
        done = time.perf_counter()
        return done - timings["predicted_ms"] / 1000, done

    def work(rows: int, prompt: int, new: int) -> Answer:
        asked = prompts(rows, prompt, VOCABULARY)
        with ThreadPoolExecutor(rows) as pool:
            began = time.perf_counter()
            answers = list(pool.map(ask, asked, [new] * rows))
        return max(first for first, _ in answers) - began, max(done for _, done in answers) - began

    return work


def main() -> None:
    kind, model, setting = sys.argv[1:]
    with open(os.dup(1), "w") as answers:  # noqa: PTH123 - a descriptor
        os.dup2(2, 1)  # output of libraries must not look like an answer
        work = {"finback": finback, "transformers": transformers, "llama.cpp": llama}[kind](model, setting)
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            first, total = work(asked["rows"], asked["prompt"], asked["new"])
            print(json.dumps({"first": first, "total": total}), file=answers, flush=True)


if __name__ == "__main__":
    main()
