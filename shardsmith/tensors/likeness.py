"""Names that are like other names: patterns that fit some and not the others, and endings that two have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def patterns_for(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """Return patterns that fit these names and none of the others, such as ``critic.*`` for all that begin so."""
    taken = {name.split(".", 1)[0] for name in others}
    roots = ((name.split(".", 1)[0], name) for name in names)
    return tuple(dict.fromkeys(f"{root}.*" if "." in name and root not in taken else name for root, name in roots))


def ending_alike(name: str, names: Collection[str]) -> str | None:
    """Return a name itself, if it is one of the names, or the one that ends as it does in most segments."""
    if name in names:
        return name
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        found = [other for other in names if other.split(".")[-count:] == parts[-count:]]
        if found:
            return found[0] if len(found) == 1 else None
    return None
