"""Open checkpoints in and out: the same logits as transformers in every family, every tensor accounted for."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finback.checkpoint import hf
from finback.checkpoint.export import export
from finback.checkpoint.load import load
from finback.engine.engine import Engine
from finback.engine.sequence import Sampling
from tests.families import FAMILIES, build, spell_as_released

EXAMPLES = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("family", FAMILIES)
@EXAMPLES
@given(data=st.data())
def test_logits_and_greedy_text_are_those_of_transformers(family: str, data: st.DataObject) -> None:
    config = data.draw(FAMILIES[family])
    theirs = build(config, data.draw(st.integers(0, 1000)))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        if data.draw(st.booleans()):
            spell_as_released(Path(folder))
        ours, audit = load(Path(folder))
        assert audit.holds and not audit.unexpected
        back = transformers_loads(ours.eval(), Path(folder) / "out")
    tokens = torch.randint(3, config.vocab_size, (3, 24))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (ours.logits(ours(tokens)) - expected).abs().max() <= 1e-4
        assert (back(tokens).logits - expected).abs().max() <= 1e-4
    same_greedy_text(ours, theirs, tokens)


def transformers_loads(ours: Any, folder: Path) -> Any:
    """Our export as transformers reads it, with no key missing and none left over."""
    export(ours, folder, "fp32")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def same_greedy_text(ours: Any, theirs: Any, tokens: torch.Tensor) -> None:
    """32 tokens after prompts of unequal length: padded on the left there, on the right here."""
    prompts = [tokens[0, :5].tolist(), tokens[1, :9].tolist(), tokens[2, :1].tolist()]
    longest = max(map(len, prompts))
    padded = torch.tensor([[2] * (longest - len(p)) + p for p in prompts])
    with torch.no_grad():
        made = theirs.generate(
            padded, attention_mask=(padded != 2).long(), max_new_tokens=32, do_sample=False, eos_token_id=None,
            pad_token_id=2,
        )[:, longest:]  # fmt: skip
    mine = Engine(ours, stops=()).generate(prompts, Sampling(temperature=0.0, max_tokens=32), [0, 0, 0])
    assert [c.tokens for c in mine] == made.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@EXAMPLES
@given(data=st.data())
def test_a_config_survives_writing_and_reading(family: str, data: st.DataObject) -> None:
    config = hf.model_config(data.draw(FAMILIES[family]).to_dict())
    assert hf.model_config(hf.raw_config(config, "float32")) == config
