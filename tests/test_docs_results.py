"""docs/results.md says what benchmarks/results says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_results_are_those_of_the_measurements(tmp_path: Path) -> None:
    made = tmp_path / "results.md"
    subprocess.run([sys.executable, str(ROOT / "scripts/results.py"), str(made)], check=True)
    assert made.read_text(encoding="utf-8") == (ROOT / "docs/results.md").read_text(encoding="utf-8"), "make results"
