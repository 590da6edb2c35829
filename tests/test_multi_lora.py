"""Several adapters on one base in one batch: each request gets the answer of its adapter alone, merged."""

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finback.checkpoint import peft_export
from finback.checkpoint.export import export
from finback.checkpoint.inference import InferenceDtype, load_for_inference
from finback.checkpoint.peft import digest
from finback.comparison.local import digest_of
from finback.config import UserError
from finback.data import tokenizer as tokenizers
from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine, EngineConfig
from finback.engine.llm import LLM
from finback.engine.open import adapter_tokenizer, open_engine
from finback.engine.request import Request, SamplingParams
from finback.kernels import packed
from finback.model.lora import AdaptedTransformer, LoRA, merge
from finback.model.multi_lora import adapters_of_rows, put_adapters
from finback.model.transformer import Transformer
from finback.runs.adapters import CONFIG_FILE, WEIGHTS_FILE
from finback.serve.options import ServeOptions
from tests.serving import CHAT, served, small_tokenizer
from tests.test_lora import adapted, base_of

STD = 0.08  # of the weights; with larger ones rounding in fp32 alone exceeds 1e-5
LORAS = {
    "whole": LoRA(rank=3, alpha=5.0, base="fp32"),
    "attention": LoRA(rank=4, rs=True, targets=("attention",), base="fp32"),
    "mlp": LoRA(rank=2, alpha=8.0, targets=("mlp", "v_proj", "kv_b_proj"), base="fp32"),
}
SHARED = [7, 8, 9, 10] * 11  # a prefix of more than two pages
PROMPTS = [[*SHARED, 5, 6], [*SHARED, 17], [20] * 5]
GREEDY = SamplingParams(0.0, 8)


def adapters(family: str) -> dict[str, AdaptedTransformer]:
    return {name: adapted(family, lora, std=STD) for name, lora in LORAS.items()}


def ask(engine: Engine, names: list[str], sampling: SamplingParams = GREEDY) -> dict[tuple[str, int], Request]:
    """Submits every prompt for every adapter, all in one batch."""
    asked = {
        (name, i): engine.submit(prompt, sampling, i, adapter=name)
        for i, prompt in enumerate(PROMPTS)
        for name in names
    }
    while engine.busy:
        engine.step()
    return asked


def alone(model: Transformer, sampling: SamplingParams, config: EngineConfig) -> list[Request]:
    return [r for (_, i), r in sorted(ask(Engine(model, [1], config), [""], sampling).items())]


@pytest.mark.parametrize(
    ("family", "chunk"),
    [("mla", 512), ("sparse", 20), ("lite", 20), ("gqa", 512), ("experts", 20), ("post", 20), ("oss", 20), ("v4", 512)],
)
def test_a_mixed_batch_says_what_each_adapter_says_alone(family: str, chunk: int) -> None:
    """Prompts read whole, in chunks and after cached pages, and tokens in absorbed form, with drafts."""
    config = EngineConfig(rows=16, tokens=4096, chunk=chunk, reuse=True, speculate=chunk == 512)
    sampling = GREEDY if chunk == 512 else SamplingParams(1.0, 8)
    base = base_of(family, std=STD)
    merged = {n: merge(copy.deepcopy(m), torch.float32) for n, m in adapters(family).items()} | {
        "": copy.deepcopy(base)
    }
    expected = {name: alone(model, sampling, config) for name, model in merged.items()}
    engine = Engine(put_adapters(base, adapters(family)), [1], config)
    found = ask(engine, ["", *LORAS], sampling)
    texts = set()
    for (name, i), request in found.items():
        assert request.tokens == expected[name][i].tokens, (name, i)
        torch.testing.assert_close(request.logprobs, expected[name][i].logprobs, atol=1e-5, rtol=0)
        texts.add((i, tuple(request.logprobs)))
    assert len(texts) == len(found), "the answers of all adapters must differ"
    again = {name: engine.submit(PROMPTS[1], sampling, 1, adapter=name) for name in ("", *LORAS)}
    fresh = engine.submit(PROMPTS[1], sampling, 1, salt=b"other", adapter="mlp")
    engine.step()
    assert all(r.cached >= 32 for r in again.values()) and fresh.cached == 0
    while engine.busy:
        engine.step()
    for name, request in again.items():
        assert request.tokens == expected[name][1].tokens
        torch.testing.assert_close(request.logprobs, expected[name][1].logprobs, atol=1e-5, rtol=0)
    assert fresh.tokens == expected["mlp"][1].tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base with MLA and experts in Hugging Face's files, and its adapters in PEFT's, one with its own tokenizer."""
    root = tmp_path_factory.mktemp("adapters")
    export(base_of("mla", std=STD), root / "hf", "fp32")
    small_tokenizer().export(root / "hf")
    found = {name: root / name for name in LORAS}
    for name, model in adapters("mla").items():
        found[name].mkdir()
        model.base, model.base_digest = str(root / "hf"), digest(base_of("mla", std=STD))
        peft_export.save(found[name], model)
    small_tokenizer().export(found["mlp"])
    (found["mlp"] / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 99], "temperature": 0.0}))
    return root / "hf", found


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_adapters_lie_on_packed_weights_too(folders: tuple[Path, dict[str, Path]], dtype: InferenceDtype) -> None:
    if not packed.available("bf16"):
        pytest.skip("this processor has no such matrix products")
    base, found = folders
    model = load_for_inference(base, dtype, found)
    rows = torch.arange(4 * 24).view(4, 24) + 100
    merged = [load_for_inference(Path(f"{base}+{folder}"), dtype) for folder in found.values()]
    with torch.inference_mode():
        plain = model.logits(model(rows))
        with adapters_of_rows(model, [0, 1, 2, 3]):
            mixed = model.logits(model(rows))
        wanted = [each.logits(each(rows)) for each in merged]
    torch.testing.assert_close(mixed[0], plain[0])
    for place in (1, 2, 3):
        delta = (wanted[place - 1] - plain)[place].norm()
        assert (mixed - wanted[place - 1])[place].norm() < 0.1 * delta, list(found)[place - 1]


def test_a_server_has_adapters_under_their_names(folders: tuple[Path, dict[str, Path]]) -> None:
    base, found = folders
    engine, tokenizer = open_engine(base, "fp32", EngineConfig(8, 4096, 64, True, True), found)
    words = {name: adapter_tokenizer(folder, tokenizer) for name, folder in found.items()}
    assert [w is tokenizer for w in words.values()] == [True, True, False]
    question = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "logprobs": True}
    with served(engine, adapters=words, name="base", aliases=("other",)) as client:
        listed = client.get("/v1/models").json()["data"]
        assert [(m["id"], m.get("parent")) for m in listed] == [
            ("base", None),
            ("other", None),
            *((name, "base") for name in found),
        ]

        def answer(name: str) -> dict[str, Any]:
            sent: dict[str, Any] = question | {"model": name} | ({} if name == "mlp" else {"temperature": 0})
            reply: dict[str, Any] = client.post(CHAT, json=sent).json()
            return reply

        with ThreadPoolExecutor(8) as pool:
            replies = dict(zip(["base", *found], pool.map(answer, ["base", *found]), strict=True))
        missing = client.post(CHAT, json=question | {"model": "mpl"})
        assert missing.status_code == 404 and "Did you mean 'mlp'?" in missing.text
        assert "finback_queued 0" in client.get("/metrics").text
    assert engine.busy is False and engine.pages.free == engine.pages.count
    both = LLM(base, "fp32", adapters=found)
    for name, reply in replies.items():
        llm = LLM(base if name == "base" else f"{base}+{found[name]}", "fp32")
        stop = (99,) if name == "mlp" else ()  # from its own generation_config.json
        said = llm.chat("Hello", llm.defaults(temperature=0.0, max_tokens=12, stop_token_ids=stop))
        choice = reply["choices"][0]
        assert reply["model"] == name and choice["finish_reason"] == said.finish_reason
        logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        torch.testing.assert_close(logprobs, said.logprobs[: len(logprobs)], atol=1e-5, rtol=0)
        sampling = llm.defaults(temperature=0.0, max_tokens=6)
        ours = both.generate(["The whale", "4+5"], sampling, adapter="" if name == "base" else name)
        assert [o.tokens for o in ours] == [o.tokens for o in llm.generate(["The whale", "4+5"], sampling)]


def test_answers_of_an_adapter_are_kept_under_its_files_and_its_bases(folders: tuple[Path, dict[str, Path]]) -> None:
    base, found = folders
    ways = {digest_of(base), *(digest_of(folder) for folder in found.values())}
    assert len(ways) == 4 and {digest_of(Path(f"{base}+{folder}")) for folder in found.values()} < ways


def change(folder: Path, to: Path, **keys: Any) -> Path:
    """A copy of an adapter with a changed config."""
    shutil.copytree(folder, to)
    raw = json.loads((to / CONFIG_FILE).read_text()) | keys
    (to / CONFIG_FILE).write_text(json.dumps(raw))
    return to


def test_what_is_no_adapter_of_the_model_is_refused_before_serving(
    folders: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, found = folders
    whole = found["whole"]
    for given, text in (
        (("sums",), r"--adapter = 'sums': not NAME=FOLDER\. Write it as in"),
        ((f"hf={whole}",), "the name hf is already in use"),
        ((f"a={whole}", f"a={found['mlp']}"), "the name a is already in use"),
        ((f"a={base}",), r"--adapter = 'a=.*hf': .*hf has no adapter_config.json\. Give a folder"),
    ):
        with pytest.raises(UserError, match=text):
            ServeOptions(model=base, lora=given)
    export(base_of("gqa"), tmp_path / "other", "fp32")
    small_tokenizer().export(tmp_path / "other")
    torn = {n: t[..., :-1].contiguous() for n, t in load_file(whole / WEIGHTS_FILE).items()}
    bad = change(whole, tmp_path / "bad")
    save_file(torn, bad / WEIGHTS_FILE)
    for path, folder, text in (
        (tmp_path / "other", whole, r"base = '.*other': its weights differ from those that .*whole was made for"),
        (base, change(whole, tmp_path / "zero", r=0), r"adapter\.rank = 0: not above 0"),
        (base, change(whole, tmp_path / "dora", use_dora=True), r"adapter use_dora = True"),
        (base, bad, r"lora_B .* does not fit the base's"),
        (whole, found["mlp"], r"MODEL = '.*whole': already includes an adapter\. Name its base"),
    ):
        with pytest.raises(UserError, match=text):
            load_for_inference(path, "fp32", {"a": folder})
    tokenizers.train(["Other words."] * 9, 290, bad / "tokenizer.json")
    with pytest.raises(UserError, match=r"does not have the vocabulary of its base\. Remove tokenizer.json from"):
        adapter_tokenizer(bad, Tokenizer(base))
    engine, _ = open_engine(base, "fp32", adapters=found)
    with pytest.raises(UserError, match=r"adapter = 'hole': .*Did you mean 'whole'"):
        engine.submit([1, 2], GREEDY, 0, adapter="hole")
    with pytest.raises(UserError, match=r"adapter = 'whole': the model has no such adapter\. Known: none"):
        Engine(base_of("gqa"), [1]).submit([1, 2], GREEDY, 0, adapter="whole")
