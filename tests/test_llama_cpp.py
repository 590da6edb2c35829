"""Files that finback writes, in a real llama.cpp (the `xllamacpp` wheel): the same log-probabilities and the same ids.

Needs `pip install xllamacpp`. Each file is opened in a separate process, since llama.cpp aborts on a file it rejects.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.functional import gelu

from finback.checkpoint import gguf_export, models
from finback.data import tokenizer
from finback.data.gguf_vocabulary import keys
from finback.data.tokenizer import Tokenizer
from finback.engine.llm import LLM
from finback.engine.request import SamplingParams
from finback.report.gguf_file import export_gguf
from finback.report.tokenizer_parity import texts
from finback.tasks.math import Chains
from finback.tasks.task import distinct
from tests.test_gguf_export import GEMMA_27B, MODELS, filled
from tests.test_gguf_sentencepiece import vocabulary

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.slow
ROWS = 320
# the output of the quickstart, in its default folder or another
QUICKSTART = Path(os.environ.get("FINBACK_QUICKSTART", "runs/tiny"))

# argv: a file and the questions; the cache is in F32 without flash attention, or log-probabilities would differ by 1e-3
ASK = """
import json, os, sys, urllib.request
import xllamacpp as x
path, asked = sys.argv[1], json.loads(open(sys.argv[2]).read())
p = x.CommonParams()
p.model.path, p.n_ctx, p.cpuparams.n_threads, p.warmup = path, 256, 1, False
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = x.Server(p)
def post(place, body):
    request = urllib.request.Request(server.listening_address + place, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))
logprobs = []
for ids in asked["ids"]:
    answer = post("/completion", {"prompt": ids, "n_predict": 1, "n_probs": asked["rows"], "temperature": 0, "cache_prompt": False})
    found = answer.get("completion_probabilities")  # none where the first token ends the text, or is a piece of a letter
    logprobs.append({t["id"]: t["logprob"] for t in found[0]["top_logprobs"]} if found else {})
ids = [post("/tokenize", {"content": t, "add_special": False, "parse_special": False})["tokens"] for t in asked["texts"]]
prompt = post("/apply-template", {"messages": [{"role": "user", "content": "hello 12?"}]})["prompt"]
greedy = {"temperature": 0, "max_tokens": 96, "cache_prompt": False, "reasoning_format": "none"}
chats = [post("/v1/chat/completions", greedy | {"messages": [{"role": "user", "content": c}]}) for c in asked["chats"]]
said = [chat["choices"][0]["message"]["content"] for chat in chats]
print("ANSWER" + json.dumps({"logprobs": logprobs, "ids": ids, "prompt": prompt, "said": said}), flush=True)
os._exit(0)
"""


def ask(
    file: Path, ids: list[list[int]], said: list[str], rows: int = ROWS, chats: Sequence[str] = ()
) -> dict[str, Any]:
    question = file.with_suffix(".json")
    question.write_text(json.dumps({"ids": ids, "rows": rows, "texts": said, "chats": list(chats)}))
    done = subprocess.run([sys.executable, "-c", ASK, file, question], capture_output=True, text=True, timeout=600)
    assert "ANSWER" in done.stdout, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.rpartition("ANSWER")[2])
    return found


def gelu_by_table(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """ggml's GELU on a CPU: a table from fp16 to fp16 numbers."""
    found = gelu(x.half().float(), approximate=approximate).half().float()
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, found))


MODELS_HERE = MODELS | {"gemma3, 27B": GEMMA_27B}


@pytest.mark.parametrize("name", MODELS_HERE)
def test_log_probabilities_and_ids_are_ours(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("gemma3"):
        monkeypatch.setattr(functional, "gelu", gelu_by_table)
    model = filled(dataclasses.replace(MODELS_HERE[name], vocab_size=ROWS, max_position_embeddings=256))
    if "27B" in name:  # its many layers would accumulate the error of that table
        for block in model.blocks:
            block.feed_forward.norm.weight.data -= 0.9
    tokenizer.train(
        ["hello world, 12 + 34 = 46. How are you today? hello hello world"], 290, tmp_path / "tokenizer.json"
    )
    words, said = Tokenizer(tmp_path), [text for text in texts([]) if text] if name == "V3" else ["hello"]
    gguf_export.write(model, tmp_path / "m.gguf", "f32", keys(words, ROWS))
    ids = torch.randint(0, 288, (3, 60), generator=torch.Generator().manual_seed(1))
    found = ask(tmp_path / "m.gguf", ids.tolist(), said)
    with torch.no_grad():
        expected = model.logits(model(ids))[:, -1].log_softmax(-1)
    compared = [(row, each) for row, each in zip(expected, found["logprobs"], strict=True) if each]
    assert compared
    for row, each in compared:
        assert (torch.tensor([each[str(n)] for n in range(ROWS)]) - row).abs().max() <= 1e-3
    assert found["ids"] == [words.encode(text) for text in said]
    assert found["prompt"] == "<｜User｜>hello 12?<｜Assistant｜>"


WIDE = dataclasses.replace(
    MODELS["qwen3"], hidden_size=256, intermediate_size=512, head_dim=64, vocab_size=ROWS, max_position_embeddings=256
)


@pytest.mark.parametrize("kind", ["q8_0", "q6_k", "q5_0", "q4_0", "q4_k_m"])
def test_quantized_files_mean_there_what_they_mean_here(kind: Any, tmp_path: Path) -> None:
    """Mean KL of the next token; llama.cpp's activations have 8 bits, ours are not quantized."""
    words = tokenizer.train(["hello world, 12 + 34 = 46."], 290, tmp_path / "tokenizer.json")
    gguf_export.write(filled(WIDE), tmp_path / "m.gguf", kind, keys(words, ROWS))
    ids = torch.randint(0, 288, (16, 40), generator=torch.Generator().manual_seed(2))
    found = ask(tmp_path / "m.gguf", ids.tolist(), ["hello"])["logprobs"]
    ours = models.load(tmp_path / "m.gguf").eval()
    with torch.no_grad():
        expected = ours.logits(ours(ids))[:, -1].log_softmax(-1)
    compared = [(row, torch.tensor([each[str(n)] for n in range(ROWS)])) for row, each in enumerate(found) if each]
    divergences = [(expected[row].exp() * (expected[row] - theirs)).sum() for row, theirs in compared]
    assert len(divergences) >= 8 and torch.stack(divergences).mean() <= 1e-2, divergences


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_ours(prefix: bool, tmp_path: Path) -> None:
    pieces, scores, kinds = vocabulary()
    named = {"model": "llama", "tokens": pieces, "scores": scores, "token_type": kinds, "add_space_prefix": prefix}
    named |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": False}
    given = {f"tokenizer.ggml.{name}": value for name, value in named.items()}
    model = filled(dataclasses.replace(MODELS["llama"], vocab_size=len(pieces), max_position_embeddings=256))
    gguf_export.write(model, tmp_path / "m.gguf", "f32", given)
    said = [text for text in texts([]) if text and "▁" not in text]
    found = ask(tmp_path / "m.gguf", [], said)["ids"]
    words = Tokenizer(tmp_path / "m.gguf")
    wrong = [text for text, ids in zip(said, found, strict=True) if words.encode(text) != ids]
    assert not wrong, wrong[:5]
    (tmp_path / "words").mkdir()
    words.save(tmp_path / "words")  # its tokenizer.json has merges and no scores
    gguf_export.write(model, tmp_path / "again.gguf", "f32", keys(Tokenizer(tmp_path / "words"), len(pieces)))
    assert ask(tmp_path / "again.gguf", [], said)["ids"] == found


def test_the_quickstarts_model_chats_there_as_it_does_here(tmp_path: Path) -> None:
    """Compares greedy answers to 50 sums, chains included, with llama.cpp's own parsing of template and stop tokens."""
    if not (QUICKSTART / "zero/model.safetensors").is_file():
        pytest.skip(f"{QUICKSTART} holds no trained model; `finback run recipes/tiny.py` makes it")
    export_gguf(QUICKSTART / "zero", tmp_path / "m.gguf", "f32")
    asked = [problem.question for problem in distinct(Chains(2, 7), "held_out", 50, seed=1)]
    found = ask(tmp_path / "m.gguf", [], [], chats=asked)["said"]
    here = LLM(QUICKSTART / "zero", "fp32")
    greedy = SamplingParams(temperature=0.0, max_tokens=96)
    expected = [out.text for out in here.generate([here.encode(question)[0] for question in asked], greedy)]
    assert found == expected and sum("<think>" in text for text in found) >= 25
