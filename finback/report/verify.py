"""The verification card: whether a checkpoint matches its config, and whether its logits match its makers' implementation.

Nothing is taken on trust: names and shapes are checked against the config, counts against the closed form, copies against
their originals, text through encoding and decoding, logits against transformers if it is installed.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finback.checkpoint import models, names
from finback.checkpoint.audit import Audit, differing_copies, examine
from finback.checkpoint.hf_config import read_config
from finback.checkpoint.places import demand_checkpoint
from finback.checkpoint.shards import Weights
from finback.config import UserError
from finback.data import tokenizer_files
from finback.data.tokenizer import OWN_FORM, Tokenizer
from finback.kernels import fp8
from finback.model.count import parameters
from finback.report import tokenizer_parity
from finback.report.logit_parity import Finding, against_finback, against_transformers, shortage
from finback.runs.files import is_gguf
from finback.runs.hub_models import fetched


@dataclass
class Check:
    """One line of the card. `holds` is None for what was not checked, or is only informative."""

    name: str
    holds: bool | None
    text: str
    details: list[str] = field(default_factory=list)


@dataclass
class Card:
    """All checks of one checkpoint."""

    model: str
    family: str
    checks: list[Check]

    @property
    def holds(self) -> bool:
        """Whether no check failed."""
        return all(c.holds is not False for c in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The card as JSON values."""
        return {
            "model": self.model,
            "family": self.family,
            "holds": self.holds,
            "checks": [dataclasses.asdict(c) for c in self.checks],
        }

    def as_text(self) -> str:
        """The card as text that is also valid Markdown."""
        marks = {True: "ok  ", False: "FAIL", None: "-   "}
        lines = [f"# Verification of {self.model} ({self.family})", ""]
        for c in self.checks:
            lines.append(f"    {marks[c.holds]} {c.name:16} {c.text}")
            lines += [f"         {'':16} {detail}" for detail in c.details[:20]]
            if len(c.details) > 20:
                lines.append(f"         {'':16} and {len(c.details) - 20:,} more")
        verdict = "All checks passed." if self.holds else "NOT all checks passed."
        return "\n".join([*lines, "", verdict, ""])


def verify(path: Path, against: Path | None = None, max_kl: float = 1e-4) -> Card:
    """Verifies a Hugging Face folder or a GGUF file, and compares it with another checkpoint if `against` is given."""
    path, against = fetched(path), None if against is None else fetched(against)
    problem = "neither a Hugging Face folder nor a .gguf file"
    demand_checkpoint(path, "FOLDER", "Export a stage's model with `finback export`.", problem)
    weights, audit = examine(path)
    config = audit.config
    depth, copies = config.num_nextn_predict_layers, _copies(audit, weights)
    mtp = Check("MTP", None, f"{depth} layer(s) loaded" if depth else "none")
    checks = [_tensors(audit, weights), _parameters(audit, weights), *_routers(audit, weights), mtp, copies]
    checks.append(_tokenizer(path, config.vocab_size))
    if not audit.holds or copies.holds is False:
        checks.append(Check("logits", None, "not compared: the tensors do not match"))
    elif short := shortage(config):  # a model too large to build is read one tensor at a time
        stored = ((name, weights.read(name)) for name in audit.loaded)
        checks += [_values(stored), Check("logits", None, f"not compared: {short}")]
    else:
        quantized = [spec.shape for spec in weights.specs.values() if spec.dtype == "F8_E4M3"]
        # transformers dequantizes FP8 to bf16; for the comparison we do so too
        model = models.load(path, weights="bf16" if quantized else "fp32").eval()
        checks.append(_values(model.state_dict().items()))
        if any(side % fp8.BLOCK for shape in quantized for side in shape):
            text = "not compared: transformers dequantizes partial FP8 blocks wrongly (seen in 5.23)"
            checks.append(Check("logits", None, text))
        else:
            checks.append(_agrees("transformers", against_transformers(model, path, max_kl)))
        if against is not None:
            checks.append(_agrees(str(against), against_finback(model, models.load(against).eval(), max_kl)))
    family = "GGUF" if is_gguf(path) else str(read_config(path)["model_type"])
    return Card(str(path), family, checks)


def write(card: Card, path: Path) -> None:
    """Writes the card to a file: JSON if the name ends in .json, else Markdown."""
    text = json.dumps(card.as_json(), indent=2) + "\n" if path.suffix == ".json" else card.as_text()
    path.write_text(text, encoding="utf-8")


def _tensors(audit: Audit, weights: Weights) -> Check:
    """Checks that every tensor of the files is loaded, or skipped for a known reason."""
    dtypes = Counter(weights.specs[n].dtype for n in audit.loaded)
    counts = ", ".join(f"{n:,} {dtype}" for dtype, n in sorted(dtypes.items()))
    text = f"{len(weights.specs):,} in the files: {len(audit.loaded):,} loaded ({counts})"
    reasons = Counter(audit.skipped.values())
    details = [f"skipped {n:,}: {reason}" for reason, n in reasons.items()] + audit.notes
    details += [f"MISSING {n}" for n in audit.missing] + [f"UNEXPECTED {n}" for n in audit.unexpected]
    details += [f"WRONG {n}: {problem}" for n, problem in audit.wrong.items()]
    bad = len(audit.missing) + len(audit.unexpected) + len(audit.wrong)
    return Check("tensors", audit.holds, text + (f", {bad:,} NOT as config.json has it" if bad else ""), details)


def _parameters(audit: Audit, weights: Weights) -> Check:
    """Compares the number of elements in the files with the closed form."""
    counted = [name for name in audit.loaded if not name.endswith((*names.BIASES, names.TABLE))]
    found = sum(math.prod(weights.specs[name].shape) for name in counted)
    expected, active = parameters(audit.config), parameters(audit.config, active=True, mtp=False)
    text = f"{found:,} counted, {expected:,} by the closed form, {active:,} active per token"
    return Check("parameters", found == expected, text)


def _routers(audit: Audit, weights: Weights) -> list[Check]:
    """Checks the selection biases: present in every MoE layer, and not all zero."""
    biases = [n for n in audit.loaded if n.endswith(names.BIASES) and n not in audit.wrong]
    config = audit.config
    layers = range(config.num_hash_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    wanted = sum(map(config.is_moe, layers)) if config.scoring_func != "softmax" else 0
    if not wanted:
        return []
    largest = max((float(weights.read(n).float().abs().max()) for n in biases), default=0.0)
    text = f"{len(biases)} of {wanted} selection biases, largest {largest:.3g}"
    note = [] if largest else ["all zero: a model that was never balanced, or a conversion that lost them"]
    return [Check("router bias", len(biases) == wanted, text, note)]


def _copies(audit: Audit, weights: Weights) -> Check:
    """Checks that tensors skipped as copies are copies."""
    originals = names.copies(audit.config)
    copies = [n for n in audit.skipped if n in originals]
    different = [f"{name} differs from {source}" for name, source in differing_copies(weights, audit)]
    return Check("copies", not different if copies else None, f"{len(copies)} repeated tensors", different)


def _values(tensors: Iterable[tuple[str, Tensor]]) -> Check:
    """Checks that no weight is NaN or infinite."""
    bad = [n for n, t in tensors if not torch.isfinite(t.float()).all()]
    return Check("values", not bad, "all finite" if not bad else "not finite:", bad)


def _tokenizer(path: Path, rows: int) -> Check:
    """Checks the tokenizer: works, belongs to the model, has an end-of-sequence token, and equals the one that transformers builds."""
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        kept = tokenizer_files.other_forms(path)
        return Check("tokenizer", None, f"only as {', '.join(kept)}" if kept else "none in the folder")
    try:
        tokenizer = Tokenizer(path)
    except UserError as error:
        return Check("tokenizer", False, str(error))
    form = "DeepSeek's form" if tokenizer.form == OWN_FORM else f"DeepSeek {tokenizer.form.title()}'s form"
    written = "its own template" if tokenizer.template else form if not tokenizer.lacks else "no template"
    text = (
        f"{tokenizer.vocab_size:,} entries for {rows:,} rows, dialogues in {written}, ends at {list(tokenizer.stops)}"
    )
    raw = read_config(path) if path.is_dir() else {}
    faults = tokenizer_parity.faults(tokenizer, rows)
    found, parity, details = tokenizer_parity.against_transformers(tokenizer, path)
    remarks = tokenizer_parity.remarks(tokenizer, raw)
    return Check("tokenizer", not faults and found is not False, f"{text}; {parity}", [*faults, *details, *remarks])


def _agrees(other: str, found: Finding) -> Check:
    holds, text, details = found
    return Check("logits", holds, f"against {other}: {text}", details)
