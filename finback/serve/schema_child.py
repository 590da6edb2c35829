"""A process of its own that compiles schemas: `python -m finback.serve.schema_child`. No torch here.

A line in is a JSON list, ["json_schema", schema] or ["lark", grammar], both as texts; a line out says what is wrong with
it, or nothing. A schema of two kilobytes can keep the library busy for hours, and only a process can be ended in the
middle of that.
"""

import json
import sys

from llguidance import LLMatcher, LLTokenizer


def _dead_end(grammar: str) -> str:
    """What is wrong with a grammar by which no answer can begin."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    matcher.compute_bitmask()
    return "no answer fits it" if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()) else ""


def main() -> None:
    """Answer line by line until the input ends."""
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
