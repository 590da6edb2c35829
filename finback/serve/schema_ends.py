"""Whether an answer to a JSON schema can end: a schema that requires itself within itself has no finite answer."""

from collections.abc import Mapping
from typing import Any

MOST_ROUNDS = 64  # each round proves that one more reference can end; ordinary schemas take two


def target(schema: Any, reference: str) -> Any:
    """The value that a local reference refers to; None if there is none."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    for part in reference.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        schema = schema.get(name) if isinstance(schema, dict) else None
    return schema


def can_end(schema: Any) -> bool:
    """Whether some finite answer fits, judged only by references and required parts (the least fixed point)."""
    proven: set[str] = set()
    for _ in range(MOST_ROUNDS):
        known = len(proven)
        seen: set[str] = set()

        def follow(reference: str, seen: set[str] = seen) -> bool:
            if reference not in seen:
                seen.add(reference)
                if _ends(target(schema, reference), follow):
                    proven.add(reference)
            return reference in proven

        if follow("#"):
            return True
        if len(proven) == known:
            return False
    return True


def _ends(value: Any, follow: Any) -> bool:
    if not isinstance(value, Mapping) or "const" in value or "enum" in value:
        return True
    if isinstance(reference := value.get("$ref"), str) and not follow(reference):
        return False
    for name, enough in (("allOf", all), ("anyOf", any), ("oneOf", any)):
        branches = value.get(name)
        if isinstance(branches, list) and branches and not enough(_ends(branch, follow) for branch in branches):
            return False
    kind = value.get("type")
    if kind in ("object", ["object"]):
        properties, required = value.get("properties"), value.get("required")
        inner = properties if isinstance(properties, dict) else {}
        return all(_ends(inner.get(name), follow) for name in required if isinstance(name, str)) if required else True
    least = value.get("minItems")
    if kind in ("array", ["array"]) and isinstance(least, int) and least > 0:
        given = value.get("prefixItems")
        first = given[:least] if isinstance(given, list) else []
        rest = [value.get("items")] if least > len(first) else []
        return all(_ends(each, follow) for each in (*first, *rest))
    return True
