"""A process of its own that compiles schemas: `python -m finback.serve.schema_child`. No torch here.

A line in is a JSON list, ["json_schema", schema] or ["lark", grammar], both as texts; a line out says what is wrong with
it, or nothing. A schema of two kilobytes can keep the library busy for hours, and only a process can be ended in the
middle of that.
"""

import json
import sys
from typing import Any


def main() -> None:
    """Answer line by line until the input ends."""
    matcher = _matcher()
    print("ready", flush=True)
    for line in sys.stdin:
        problem = ""
        if matcher is not None:
            try:
                kind, text = json.loads(line)
                problem = matcher.validate_grammar(getattr(matcher, f"grammar_from_{kind}")(text))
            except Exception as error:
                problem = str(error) or type(error).__name__
        print(json.dumps(problem), flush=True)


def _matcher() -> Any:
    try:
        import llguidance
    except ImportError:  # the engine will say so
        return None
    return llguidance.LLMatcher


if __name__ == "__main__":
    main()
