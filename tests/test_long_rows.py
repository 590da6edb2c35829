"""Long rows: attention per document equals attention under a mask, and memory grows linearly with the tokens."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from finback.kernels import documents
from finback.kernels.attention import torch_attention
from finback.kernels.documents import Documents, document_attention, fused_attention, mask_of, masked
from finback.model.config import ModelConfig
from finback.model.transformer import Transformer
from finback.train.batch import of_windows
from tests.toy import CONFIG, DENSE, ROOT, backward_batch, environment

IDS = torch.tensor([[0] * 9 + [1] + [2] * 14, [0] * 14 + [1] * 9 + [7]])


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    """Checks within 1e-6 of the largest number."""
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-6 * max(1.0, b.abs().max().item())


def test_lengths_are_those_of_documents_row_after_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(mask_of(IDS), Tensor), "short rows keep their mask and bit-identical results"
    monkeypatch.setattr(documents, "LONGEST_MASKED", 8)
    assert mask_of(IDS) == Documents((9, 1, 14, 14, 9, 1))


@pytest.mark.parametrize("heads", [(3, 3, 12), (6, 2, 16)], ids=["mla", "gqa"])
def test_document_by_document_equals_the_mask(heads: tuple[int, int, int]) -> None:
    """Output and gradients; values may be narrower than keys, and heads may share keys."""
    queries, keys, width = heads
    generator = torch.Generator().manual_seed(1)
    shapes = (queries, 16), (keys, 16), (keys, width)
    # the layout that projections give: heads after tokens
    given = [torch.randn(2, 24, *shape, generator=generator).transpose(1, 2) for shape in shapes]
    results = []
    for mask in (masked(IDS), Documents((9, 1, 14, 14, 9, 1))):
        inputs = [t.clone().requires_grad_() for t in given]
        out = torch_attention(*inputs, 0.3, mask)
        (out * torch.arange(width)).sum().backward()
        results.append([out.detach(), *(t.grad for t in inputs)])
    close(*results)


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["mla", "gqa"])
def test_a_model_reads_packed_rows_the_same_without_a_mask(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer(config).initialise(3).train()
    depths = config.num_nextn_predict_layers
    windows = torch.randint(0, 320, (2, 25 + depths), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([IDS, IDS[:, -1:].expand(-1, depths)], dim=1)
    batch = dataclasses.replace(of_windows(windows, depths), document_ids=ids)
    found = []
    for longest in (documents.LONGEST_MASKED, 8):
        monkeypatch.setattr(documents, "LONGEST_MASKED", longest)
        model.zero_grad()
        losses = backward_batch(model, batch, torch.tensor([48.0, 48.0]))
        found.append([losses.detached(), *(p.grad.clone() for p in model.parameters())])
    close(*found)


def test_values_narrower_than_keys_take_the_fused_kernel() -> None:
    """Otherwise torch would materialize the score matrix."""
    query, value = torch.randn(1, 2, 600, 24, requires_grad=True), torch.randn(1, 2, 600, 16)
    out = fused_attention(query, query, value, 0.2)
    assert out.shape == value.shape and out.grad_fn is not None
    assert "FlashAttention" in out.grad_fn.next_functions[0][0].name()


def test_the_kernel_of_variable_length_is_given_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks signature and semantics as documented, with a stand-in, since CPUs have no such kernel."""

    def stand_in(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most: int, _: int, **more: Any) -> Tensor:
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 24 and cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k)
        assert cu_q.tolist() == [0, 9, 10, 24, 38, 47, 48] and most == 14
        assert more == {"window_size": (-1, 0), "scale": 0.3, "enable_gqa": True}
        lengths = tuple(cu_q.diff().tolist())
        return documents._one_by_one(q, k, v, more["scale"], lengths)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    generator = torch.Generator().manual_seed(1)
    shapes = (4, 20), (2, 20), (2, 12)
    given = [torch.randn(2, 24, *shape, generator=generator).transpose(1, 2) for shape in shapes]
    one = Documents((9, 1, 14, 14, 9, 1))
    expected = document_attention(*given, 0.3, one)
    monkeypatch.setattr(documents, "_has_varlen", lambda *kinds: True)
    close([document_attention(*given, 0.3, one)], [expected])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mla", "gqa"])
def test_a_step_on_32768_packed_tokens_stays_below_3_gb(model: str) -> None:
    """Above the memory of the process before it has a model; with a mask one layer's scores alone would take 32 GB."""
    script = ROOT / "benchmarks/long_rows.py"
    command = [sys.executable, str(script), "--child", model, "documents", "32768"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert json.loads(done.stdout)["bytes"] < 3e9
