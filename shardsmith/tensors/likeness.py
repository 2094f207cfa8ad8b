"""Names that are like other names: patterns that fit some and not the others, and endings that two have in common."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Iterable


def patterns_for(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """Return patterns that fit these names and none of the others: ``critic.*``, or ``layers.*.bias`` of all layers."""
    names, others = list(names), list(others)
    taken = {name.split(".", 1)[0] for name in others}
    roots = Counter(name.split(".", 1)[0] for name in names)
    fits: dict[str, bool] = {}

    def pattern(name: str) -> str:
        root = name.split(".", 1)[0]
        if root not in taken and roots[root] > 1:
            return f"{root}.*"
        of_layers = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        if of_layers not in fits:
            fits[of_layers] = not fnmatch.filter(others, of_layers)
        return of_layers if fits[of_layers] else name

    return tuple(dict.fromkeys(map(pattern, names)))


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
