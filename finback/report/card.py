"""The model card that goes out with an export: what the files themselves can vouch for."""

from finback.checkpoint.hf import family_of
from finback.model.config import ModelConfig
from finback.model.count import parameters


def write_card(config: ModelConfig, name: str, origin: str, fmt: str) -> str:
    """Markdown with Hugging Face's header. It claims nothing that was not counted; quality is for evaluations to say."""
    family = family_of(config)
    total, active = parameters(config, mtp=False), parameters(config, active=True, mtp=False)
    experts = (
        f"{config.n_routed_experts} routed experts, {config.num_experts_per_tok} per token, "
        f"{config.n_shared_experts} shared"
        if config.n_routed_experts
        else "dense"
    )
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- finback", f"- {family}", "---",
        "", f"# {name}", "", f"Exported by finback from `{origin}`.", "",
        "| | |", "|---|---|", f"| family | {family} |", f"| parameters | {total:,}, {active:,} active per token |",
        f"| layers | {config.num_hidden_layers}, width {config.hidden_size}, {experts} |",
        f"| MTP layers | {config.num_nextn_predict_layers} |", f"| context | {config.max_position_embeddings:,} tokens |",
        f"| weights | {fmt} |", "",
        "The licence of the data and of the model it started from applies; this card does not know it.",
        "Its answers may be wrong.", "",
    ]  # fmt: skip
    return "\n".join(lines)
