"""A separate process that compiles schemas: `python -m finback.serve.schema_child`. Does not import torch.

An input line is a JSON list, ["json_schema", schema] or ["lark", grammar], with both as strings; the output line is the
error, or empty. A schema of two kilobytes can occupy the library for hours, and only a process can be killed while it
does.
"""

import json
import sys

from llguidance import LLMatcher, LLTokenizer


def _dead_end(grammar: str) -> str:
    """The error if no answer can satisfy a grammar, else ""."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    matcher.compute_bitmask()
    return "no answer fits it" if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()) else ""


def main() -> None:
    """Answers line by line until the input ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            kind, text = json.loads(line)
            grammar = getattr(LLMatcher, f"grammar_from_{kind}")(text)
            problem = LLMatcher.validate_grammar(grammar)
            if not problem and kind == "json_schema":
                problem = _dead_end(grammar)
        except Exception as error:
            problem = str(error) or type(error).__name__
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main()
