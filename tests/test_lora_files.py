"""Adapters in PEFT's files: merged, exported, refused. test_peft.py compares them with peft."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finback.checkpoint import models, peft, peft_export
from finback.checkpoint.export import export
from finback.checkpoint.quantized_base import load_quantized
from finback.checkpoint.shares import Share, Stored
from finback.config import UserError
from finback.model.frozen import BaseFormat, freeze
from finback.model.lora import adapter_parameters
from finback.model.transformer import Transformer
from tests.test_lora import DORA, adapted, base_of, logits
from tests.test_lora_stages import EXACT, FILES
from tests.toy import finback


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base in Hugging Face's files, and an adapter for it as peft writes it: without our metadata."""
    base, folder = tmp_path / "hf", tmp_path / "adapter"
    export(base_of("mla"), base, "fp32")
    folder.mkdir()
    model = adapted("mla", EXACT)
    model.base = str(base)
    peft_export.save(folder, model)
    save_file(load_file(folder / FILES[1]), folder / FILES[1], {"format": "pt"})
    return base, folder


def change(folder: Path, **keys: Any) -> None:
    raw = json.loads((folder / FILES[0]).read_text()) | keys
    (folder / FILES[0]).write_text(json.dumps(raw))


def test_adapters_are_merged_and_exported(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = folders
    wanted = logits(adapted("mla", EXACT))
    for start in (folder, Path(f"{base}+{folder}")):
        torch.testing.assert_close(logits(models.load(start).eval()), wanted, atol=2e-5, rtol=0)
    whole = tmp_path / "whole"
    assert finback("export", f"{base}+{folder}", whole, "--dtype", "fp32").returncode == 0
    torch.testing.assert_close(logits(models.load(whole).eval()), wanted, atol=2e-5, rtol=0)
    assert not (whole / FILES[0]).exists()
    cut = models.load(folder, torch.bfloat16, "bf16")
    assert {p.dtype for p in cut.parameters()} == {torch.bfloat16} and type(cut) is Transformer


def test_dora_is_written_read_and_goes_on(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = folders[0], tmp_path / "dora"
    folder.mkdir()
    model = adapted("mla", DORA)
    model.base = str(base)
    peft_export.save(folder, model)
    torch.testing.assert_close(logits(models.load(folder).eval()), logits(model), atol=2e-5, rtol=0)
    again = models.load_for_training(Path(f"{base}+{folder}"), DORA, torch.float32, 0)
    for (name, a), (_, b) in zip(adapter_parameters(model), adapter_parameters(again), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(UserError, match=r"adapter = 'rank=3, .*dora=False'.*dora=True"):
        models.load_for_training(folder, replace(DORA, dora=False), torch.float32, 0)


def test_experts_one_by_one_are_the_fused_ones(folders: tuple[Path, Path]) -> None:
    """The format of older tools: separate adapters for gate, up and down of each expert."""
    _, folder = folders
    before = logits(models.load(folder).eval())
    tensors, single = load_file(folder / FILES[1]), {}
    stem = "base_model.model.model.layers.1.mlp.experts."
    a, b = (tensors.pop(f"{stem}base_layer.lora_{each}.weight") for each in "AB")
    down_a, down_b = (tensors.pop(f"{stem}lora_{each}.weight") for each in "AB")
    for e in range(4):
        # for experts, lora_A has the slowest index and lora_B the fastest
        gate_b, up_b = b.view(len(b), 4, 4)[:, :, e].chunk(2)
        made = {"gate": (a.view(4, 4, -1)[e], gate_b), "up": (a.view(4, 4, -1)[e], up_b)}
        made["down"] = (down_a.view(4, 4, -1)[e], down_b.view(len(down_b), 4, 4)[:, :, e])
        for part, pair in made.items():
            single |= {
                f"{stem}{e}.{part}_proj.lora_{n}.weight": t.contiguous().clone()
                for n, t in zip("AB", pair, strict=True)
            }
    save_file(tensors | single, folder / FILES[1])
    torch.testing.assert_close(logits(models.load(folder).eval()), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"use_dora": True}, "lora_magnitude_vector is missing or has another size"),
        ({"use_qalora": True}, "adapter use_qalora = True: .* does more than LoRA. Merge it"),
        ({"bias": "all"}, "adapter bias = 'all'"),
        ({"lora_bias": True}, "adapter lora_bias"),
        ({"modules_to_save": ["lm_head"]}, r"adapter modules_to_save = \['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "'pissa': .* changed the weights of its base"),
        ({"peft_type": "LOHA"}, "LOHA, not LoRA"),
        ({"r": 0}, "adapter.rank = 0: not above 0"),
        ({"r": None}, "not valid LoRA settings"),
        (
            {"base_model_name_or_path": "meta/elsewhere"},
            "base_model_name_or_path = 'meta/elsewhere': the base of .* is not here",
        ),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(
    keys: dict[str, Any], text: str, folders: tuple[Path, Path]
) -> None:
    change(folders[1], **keys)
    with pytest.raises(UserError, match=text):
        models.load(folders[1])


def test_adapters_of_another_base_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = folders
    other = tmp_path / "other"
    export(base_of("gqa"), other, "fp32")
    with pytest.raises(UserError, match=r"base = '.*other': .*adapter was made for .*hf"):
        models.load(Path(f"{other}+{folder}"))
    change(folder, base_model_name_or_path="other")
    with pytest.raises(UserError, match=r"o_proj: lora_B \(32, 4\) · lora_A \(4, 16\).*It was made for other: name"):
        models.load(Path(f"{other}+{folder}"))
    tensors = load_file(folder / FILES[1])
    save_file(
        {n: t[:, :-1].contiguous() if "q_a_proj.lora_A" in n else t for n, t in tensors.items()}, folder / FILES[1]
    )
    change(folder, base_model_name_or_path="hf")
    with pytest.raises(
        UserError, match=r"q_a_proj: lora_B \(24, 4\) · lora_A \(4, 31\) does not fit the base's 24 x 32 matrix"
    ):
        models.load(Path(f"{base}+{folder}"))
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)} | tensors, folder / FILES[1])
    with pytest.raises(UserError, match="adapters of embedding, head and routers are not supported"):
        models.load(Path(f"{base}+{folder}"))
    (folder / FILES[1]).write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        models.load(Path(f"{base}+{folder}"))
    with pytest.raises(UserError, match=r"adapter = '.*nowhere': no adapter_config.json there"):
        models.load(Path(f"{base}+{tmp_path}/nowhere"))


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["mla", "gqa"])
def test_a_base_is_quantized_while_it_is_read(
    family: str, form: BaseFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits and digest equal those of a base that is read whole first, from either kind of file; one fill reads at most
    two unpacked matrices."""
    export(base_of(family), tmp_path / "hf", "fp32")
    (tmp_path / "stage").mkdir()
    models.save(tmp_path / "stage", base_of(family))
    for folder in (tmp_path / "hf", tmp_path / "stage"):
        whole = models.load(folder, weights="bf16")
        digest = peft.digest(whole)
        wanted = freeze(whole, form).state_dict()
        plain: list[int] = []
        fill = Stored.fill

        def counted(values: Stored, shares: Sequence[Share], fill: Any = fill, plain: list[int] = plain) -> None:
            plain.append(sum(share.local.ndim > 1 and ".blocks." in f".{share.name}" for share in shares))
            fill(values, shares)

        monkeypatch.setattr(Stored, "fill", counted)
        model, found = load_quantized(*models.stored(folder), form, torch.float32)
        monkeypatch.undo()
        assert found == digest and max(plain) <= 2 and not any(p.requires_grad for p in model.parameters())
        state = model.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items()), folder
