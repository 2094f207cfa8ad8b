"""What may lie at the name of a checkpoint and is no directory that can be read, each as a user may come by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def _link_to_a_file(path: Path) -> None:
    path.with_name("notes.txt").write_text("nothing")
    path.symlink_to("notes.txt")


def _link_through_a_file(path: Path) -> None:
    path.with_name("notes.txt").write_text("nothing")
    path.symlink_to("notes.txt/step")


def _loop(path: Path) -> None:
    back = path.with_name(f"back-to-{path.name}")
    path.symlink_to(back.name)
    back.symlink_to(path.name)


UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a link that leads nowhere": (
        lambda path: path.symlink_to("/nowhere/archive/step"),
        "is a link that leads nowhere",
    ),
    "a link to a file": (_link_to_a_file, "is no directory"),
    "a link through a file": (_link_through_a_file, "is no directory"),
    "a file": (lambda path: path.write_bytes(b"step"), "is no directory"),
    "a loop of links": (_loop, "cannot be read: Too many levels of symbolic links"),
    "an error of the file system": (lambda path: path.symlink_to("x" * 300), "cannot be read: File name too long"),
}
"""How each is made at a path, and what is said of it. Permissions do not hold for root, as whom tests may run."""
