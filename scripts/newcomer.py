"""Times a newcomer's first steps: clones, sets up, runs the quickstart and asks one question; records seconds and bytes of each.

    python scripts/newcomer.py [--repository .] [--folder DIR] [--quick] [--out benchmarks/results/newcomer.json]

`make results` then adds it to docs/results.md. `--quick` runs the quickstart at toy size to check the script; it only prints
its report, unless `--out` names a file.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
QUICK = (
    *("prepare.tasks.0.documents=500", "base.max_tokens=16384", "base.decay_tokens=4096", "base.warmup_tokens=2048"),
    *("zero.steps=2", "zero.prompts_per_step=2", "zero.num_generations=2", "zero.validation.problems=4"),
    *(f"{stage}.exams.{i}.problems=4" for stage in ("before", "after") for i in range(4)),
)


def size(folder: Path) -> int:
    """Bytes of all files in a folder, links not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def walk(repository: str, folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Runs the steps; returns their commands, seconds, and the bytes that each added to the folder."""
    home = folder / "finback"
    settings = " ".join(f"--set {setting}" for setting in QUICK) if quick else ""
    run = f".venv/bin/finback run recipes/tiny.py {settings}".strip()
    question = "import finback; print(finback.LLM('runs/tiny').chat('8-3+5+4-6=?'))"
    steps = (
        ("clone", f"git clone --quiet {repository} finback", folder),
        ("set up", "make .venv/.installed", home),
        ("run the quickstart", run, home),
        ("ask one question", f'.venv/bin/python -c "{question}"', home),
    )
    found, before = [], 0
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    for name, command, where in steps:
        print(f"{name}: {command}", file=sys.stderr)
        began = time.perf_counter()
        done = subprocess.run(command, shell=True, cwd=where, env=environment, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{command}: exit code {done.returncode}")
        after = size(folder)
        shown = command.replace(settings or "\0", "...").replace(repository, "REPOSITORY")
        found.append({"step": name, "command": shown, "seconds": round(seconds, 1), "bytes": after - before})
        before = after
    found[-1]["answer"] = done.stdout.strip()
    return found


def main() -> None:
    from record import machine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", default=str(ROOT), help="a path or URL that git can clone")
    parser.add_argument("--folder", type=Path, help="an empty folder; a temporary one by default")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/newcomer.json; with --quick none")
    asked = parser.parse_args()
    local = Path(asked.repository).resolve()  # git runs in another folder
    repository = str(local) if local.exists() else asked.repository
    with tempfile.TemporaryDirectory() as temporary:
        folder = (asked.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        steps = walk(repository, folder, asked.quick)
    report = {
        "benchmark": "newcomer",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_average_at_end": list(os.getloadavg()),
        "machine": machine(),
        "steps": steps,
    }
    text = json.dumps(report, indent=1)
    out = asked.out or (None if asked.quick else ROOT / "benchmarks/results/newcomer.json")
    if out is None:
        print(text)
    else:
        out.write_text(text + "\n", encoding="utf-8")
        print(out)


if __name__ == "__main__":
    main()
