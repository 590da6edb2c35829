"""The precision of training where a recipe leaves it open."""

from pathlib import Path

import pytest

from finback.model.config import TINY
from finback.runs import processor

XEON = "processor\t: 0\nmodel name\t: Old Xeon\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\nmodel name\t: Old Xeon\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n"


@pytest.mark.parametrize(
    ("cpuinfo", "chosen"), [(XEON, "fp32"), (XEON.replace("avx512f", "avx512_bf16"), "bf16"), (ARM, "bf16")]
)
def test_precision_follows_from_the_processor_and_the_width(
    cpuinfo: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor.fields.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: cpuinfo)
    assert (processor.precision(TINY.hidden_size), processor.precision(96)) == (chosen, "fp32")
    assert processor.cores() == cpuinfo.count("processor")
    monkeypatch.undo()
    processor.fields.cache_clear()
    assert processor.precision(4096, bf16=True) == "bf16" and processor.precision(4096, bf16=False) == "fp32"
