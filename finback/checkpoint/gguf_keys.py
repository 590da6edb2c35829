"""Reads a GGUF file's metadata, and refuses unread keys that affect the computation."""

import re
from typing import Any

from finback.config import UserError

# names of keys, after the architecture's, that change the computation
_COUNTS = re.compile(
    r"(attention|rope|ssm|wkv|hyper_connection|altup|adapters)\..*|.*(expert|softcapping|clamp|_scale$|interval|parallel|moe_|loops|activation).*"
)
# their values without effect; None: any value
_NOTHING: dict[str, tuple[Any, ...] | None] = {
    "attention.causal": (True,),
    "attention.head_count_kv": None,  # of latents
    "hidden_activation": ("silu", "gelu_pytorch_tanh"),
    "attention.layer_norm_epsilon": None,
    "attention.group_norm_epsilon": None,
    "attention.group_norm_groups": None,
    "attention.sliding_window_pattern": None,  # of no window
    "rope.scaling.finetuned": None,
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": None,  # llama.cpp computes it from the factor
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.original_context_length": None,  # of no scaling
    "rope.scaling.yarn_beta_fast": None,
    "rope.scaling.yarn_beta_slow": None,
    "expert_used_count": None,  # of no experts
    "expert_feed_forward_length": None,  # tensors have their shapes
    "expert_shared_feed_forward_length": None,
    "expert_group_used_count": None,  # of no groups
    "expert_weights_norm": (True,),
}
# how the names of keys end that are texts, lists of texts, lists of numbers, whole numbers; the others are numbers
_TEXTS = ("architecture", "general.type", "general.name", "scaling.type", "ggml.model", "ggml.pre", "chat_template")
_LISTS_OF_TEXTS = ("ggml.tokens", "ggml.merges")
_LISTS = ("ggml.token_type", "ggml.scores", "eos_token_ids")
_WHOLE = ("embedding_length", "block_count", "context_length", "head_count")
# by which others are divided
_SIZES = ("embedding_length", "attention.head_count", "attention.key_length")
# keys for which 1 has no effect either
_ONES = ("_scale", "group_count", "gating_func", "_step", "_n_layers")


def field(reader: Any, name: str, *default: Any) -> Any:
    """Returns a metadata value of a GGUF file; UserError if it is missing and has no default."""
    if (found := reader.fields.get(name)) is not None:
        value = found.contents()
        if not _is_of_its_kind(name, value):
            said = str(value)[:80]
            raise UserError(f"GGUF {name}", said, "of another type than llama.cpp expects", "Use a complete file.")
        return value
    if not default:
        raise UserError("GGUF", name, "missing from the file's metadata", "Use a complete file.")
    return default[0]


def of_each_token(reader: Any, name: str, *default: int) -> list[Any]:
    """A number of each token of a file's vocabulary; UserError where there are more or fewer of them."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    found: list[Any] = field(reader, f"tokenizer.ggml.{name}", *([value] * len(tokens) for value in default))
    if len(found) != len(tokens):
        problem = f"not one for each of {len(tokens):,} tokens"
        raise UserError(f"GGUF tokenizer.ggml.{name}", len(found), problem, "Use a complete file.")
    return found


def _is_of_its_kind(name: str, value: Any) -> bool:
    """Whether the value of a key has the type that llama.cpp expects; a value per layer is a list."""
    if name.endswith(_TEXTS):
        return isinstance(value, str)
    entries = value if isinstance(value, list) else [value]
    if name.endswith(_LISTS_OF_TEXTS):
        return isinstance(value, list) and all(isinstance(entry, str) for entry in entries)
    if name.endswith("_token_id"):
        return type(value) is int
    if name.endswith(_WHOLE):
        return all(type(entry) is int for entry in entries)
    return (isinstance(value, list) or not name.endswith(_LISTS)) and all(isinstance(e, int | float) for e in entries)


class ArchitectureKeys:
    """The keys of a file's architecture; records which were read."""

    def __init__(self, reader: Any, arch: str) -> None:
        self.reader, self.arch = reader, arch
        self.asked: set[str] = set()

    def __call__(self, name: str, *default: Any) -> Any:
        """Returns a value by its name after the architecture's; a list of equal counts, one a layer, as one number."""
        self.asked.add(name)
        found = field(self.reader, f"{self.arch}.{name}", *default)
        is_counts = isinstance(found, list) and found and type(found[0]) is int
        found = found[0] if is_counts and len(set(found)) == 1 else found
        if (isinstance(found, list) and not name.endswith("_pattern")) or (name in _SIZES and found < 1):
            problem = "differs between layers" if isinstance(found, list) else "below 1"
            raise UserError(f"GGUF {self.arch}.{name}", found, problem, "Use another model.")
        return found

    def refuse_unread(self, repeated: dict[str, Any]) -> None:
        """Raises UserError for the first unread key that affects the computation and does not repeat a known value."""
        for key, value in self.reader.fields.items():
            name = key.removeprefix(f"{self.arch}.")
            if name == key or name in self.asked or not _COUNTS.fullmatch(name):
                continue
            usual = (0, 1) if name.endswith(_ONES) else (0,)
            nothing = _NOTHING.get(name, (repeated[name],) if name in repeated else usual)
            if nothing is not None and (said := value.contents()) not in nothing:
                problem = "the file says how something is computed that this architecture is not known for"
                raise UserError(f"GGUF {key}", said, problem, "Use the model's safetensors files.")
