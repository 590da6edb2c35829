"""The model card of an export, with what the files themselves prove."""

from finback.checkpoint.hf_export_as import family_of
from finback.model.config import ModelConfig
from finback.model.count import parameters


def write_card(config: ModelConfig, name: str, origin: str, fmt: str) -> str:
    """Markdown with Hugging Face's header. It states only what was counted, nothing about quality."""
    header = "\n".join(front_matter(family_of(config)))
    rows = "\n".join(f"| {name} | {value} |" for name, value in (*architecture(config), ("weights", fmt)))
    return f"""---
{header}
---

# {name}

Exported by finback from `{origin}`.

| | |
|---|---|
{rows}

The licence of the data and of the model it started from applies; it is not known to this card.
Its answers may be wrong.
"""


def front_matter(family: str) -> list[str]:
    """The YAML lines that every card starts with."""
    return ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- finback", f"- {family}"]


def architecture(config: ModelConfig) -> list[tuple[str, str]]:
    """Names and values of a model's components."""
    total, active = parameters(config), parameters(config, active=True, mtp=False)
    mtp = total - parameters(config, mtp=False)
    inside = f", {mtp:,} of them in MTP layers" if mtp else ""
    experts = f"{config.n_routed_experts} routed experts, {config.num_experts_per_tok} per token"
    experts = f"{experts}, {config.n_shared_experts} shared" if config.n_routed_experts else "dense"
    return [
        ("family", family_of(config)),
        ("parameters", f"{total:,}{inside}; {active:,} active per token, MTP left out"),
        ("layers", f"{config.num_hidden_layers}, width {config.hidden_size}, {experts}"),
        ("MTP layers", str(config.num_nextn_predict_layers)),
        ("context", f"{config.max_position_embeddings:,} tokens"),
    ]
