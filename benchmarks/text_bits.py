"""Bits per byte of unseen text: a pre-trained model compared with gzip, xz and a 5-gram model that read the same text.

    python benchmarks/text_bits.py runs/base100m/base

Measures the first --bytes of each source's validation text. The model reads rows of 256 tokens, of which the first 128
are not scored; the 5-gram model and `xz after training` have read as many tokens of the training text as the model;
gzip and xz have read nothing before.
"""

import argparse
import gzip
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from driver import say
from ngram import Ints, KneserNey

from finback.checkpoint import models
from finback.data import pack
from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine
from finback.engine.request import SamplingParams
from finback.model.count import parameters
from finback.model.transformer import Transformer
from finback.runs.files import read_json

ROW, READ = 256, 128
BEGINNINGS = ("Returns a list of", "The function", "When you create", "a person who", "To start the server")


def compressed(text: bytes, known: bytes) -> dict[str, float]:
    """Bits per byte of gzip and xz at their best, and of xz when it has just compressed the training text."""

    def xz(data: bytes) -> int:
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 28}]
        return len(lzma.compress(data, filters=filters))

    return {
        "gzip": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz": 8 * xz(text) / len(text),
        "xz after training": 8 * (xz(known + text) - xz(known)) / len(text),
    }


@torch.no_grad()
def neural_bits(model: Transformer, tokens: Ints) -> float:
    """Total bits of the tokens, each predicted from at least READ tokens before it, or all there are."""
    bits, step = 0.0, ROW - READ
    for begin in range(0, len(tokens) - 1, step):
        start = max(0, begin - READ)
        row = torch.from_numpy(tokens[start : begin + step + 1])[None]
        logp = model.logits(model(row[:, :-1])).log_softmax(dim=-1)
        told = logp.gather(2, row[:, 1:, None]).flatten()[begin - start :]
        bits -= float(told.double().sum()) / math.log(2)
    return bits


def source(name: str, data: Path, seen: int, model: Transformer, tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """Bits per byte of one source's validation text, by model and compressor."""
    valid = pack.read(data / f"{name}.valid.bin")
    train = pack.read(data / f"{name}.train.bin")
    tokens = np.asarray(valid[: size // 2], dtype=np.int64)  # no token is shorter than a byte
    text = tokenizer.decode(tokens.tolist()).encode()
    share = min(1.0, size / len(text))
    tokens = tokens[: int(len(tokens) * share)]
    text = tokenizer.decode(tokens.tolist()).encode()
    known = np.asarray(train[: min(seen, len(train))], dtype=np.int64)
    counted = KneserNey(known, tokenizer.vocab_size)
    counted.check(tokens, 1000 % len(tokens))
    return {
        "bytes": len(text),
        "trained_tokens": seen,
        "tokens_there": len(train),
        "model": neural_bits(model, tokens) / len(text),
        "5-gram": -float(np.log2(counted.probabilities(tokens)).sum()) / len(text),
        **compressed(text, tokenizer.decode(known.tolist()).encode()),
    }


def samples(model: Transformer, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """The model's continuations of a few beginnings, at temperature 0.7."""
    prompts, seeds = [tokenizer.encode(text) for text in BEGINNINGS], list(range(len(BEGINNINGS)))
    said = Engine(model, tokenizer.stops).generate(prompts, SamplingParams(0.7, 60, top_p=0.95), seeds)
    return [
        {"beginning": text, "goes on": tokenizer.decode(completion.tokens)}
        for text, completion in zip(BEGINNINGS, said, strict=True)
    ]


def main() -> None:
    """Write benchmarks/results/text_bits-<cpu>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path, help="folder of a finished pre-training stage")
    parser.add_argument("--bytes", type=int, default=200_000, help="of each source")
    parser.add_argument("--out", type=Path, help="results file")
    options = parser.parse_args()
    config, said = read_json(options.stage / "config.json"), read_json(options.stage / "manifest.json")
    data, read = options.stage.parent / config["data"], said["results"]["tokens_by_source"]
    tokenizer, model = Tokenizer(options.stage), models.load(options.stage).eval()
    results = record.header(
        "text_bits",
        {
            "bytes": options.bytes,
            "parameters": parameters(model.config),
            "active_parameters": parameters(model.config, active=True),
            "stage": said["results"],
        },
    )
    results["bits_per_byte"] = {
        name: source(name, data, tokens, model, tokenizer, options.bytes) for name, tokens in read.items()
    }
    results["samples"] = samples(model, tokenizer)
    record.write(results, options.out)
    for name, found in results["bits_per_byte"].items():
        say(f"{name:10} " + "  ".join(f"{k} {v:.2f}" for k, v in found.items() if isinstance(v, float)))
    for sample in results["samples"]:
        say(f"{sample['beginning']} | {sample['goes on']}")


if __name__ == "__main__":
    main()
