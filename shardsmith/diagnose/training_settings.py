"""What a trainer's settings say about the load at its start. TOML or JSON, with the names of TorchTitan and flame."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardsmith.compare.findings import Finding, one
from shardsmith.diagnose.subject import Subject
from shardsmith.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, UsageError
from shardsmith.ground.bounded import read_bounded
from shardsmith.manifest.metadata import read_json

_MOST_BYTES = 1 << 24
_ENABLED = ("enable", "enable_checkpoint")
"""As TorchTitan 0.2 and later, and as before."""
_NEW_NAMES = ("initial_load_model_only", "initial_load_in_hf")
"""That only TorchTitan 0.2 and later have, which want a flat layout."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """A trainer's settings."""

    file: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path) -> TrainingSettings:
        """Raises CheckpointError if it cannot be read."""
        if file.suffix == ".json":
            return cls(file, read_json(file))
        try:
            return cls(file, tomllib.loads(read_bounded(file, _MOST_BYTES).decode()))
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(file, "does not exist") from error
        except (ValueError, RecursionError) as error:
            raise CorruptCheckpointError(file, f"is no TOML file of settings: {error}") from error
        except OSError as error:
            raise CheckpointError(file, f"cannot be read: {error.strerror}") from error

    def with_flags(self, flags: Sequence[str]) -> TrainingSettings:
        """These settings with those of a command line in their place, with or without dashes before them.

        ``section.name=value``, or ``section.name`` and ``section.no-name`` for what is on and off.

        Raises:
            UsageError: one is no such flag, or is of a section that the file has as a value.
        """
        # Copies of the tables: those of ``self`` stay as the file has them.
        content = {name: dict(value) if isinstance(value, Mapping) else value for name, value in self.content.items()}
        for flag in flags:
            path, equals, value = flag.lstrip("-").partition("=")
            section, dot, name = path.partition(".")
            if not (section and dot and name):
                raise UsageError(
                    f"--training-flags {flag}: write section.name=value, as checkpoint.initial_load_path=/x, or "
                    "section.name alone for what is on, as checkpoint.enable"
                )
            if not equals:
                # Both sides use the old ``name``.
                name, value = name.removeprefix("no-"), str(not name.startswith("no-"))
            known = {"true": True, "false": False}
            table = content.setdefault(section, {})
            if not isinstance(table, dict):
                raise UsageError(f"--training-flags {flag}: in {self.file} {section} is {table!r}, and no section")
            table[name.replace("-", "_")] = known.get(value.lower(), value)
        return TrainingSettings(self.file, content)

    @property
    def model_config(self) -> Path | None:
        """The Hugging Face config that flame builds its model from."""
        return self._path("model", "config")

    @property
    def tokenizer(self) -> Path | None:
        """Where the tokenizer is taken from."""
        # As TorchTitan has called it up to 0.1, and since.
        return self._path("model", "tokenizer_path") or self._path("model", "hf_assets_path")

    @property
    def names_a_checkpoint(self) -> bool:
        """Whether they say which checkpoint is loaded at the start; a trainer may also get it as a flag."""
        return self._table("checkpoint").get("initial_load_path") not in (None, "")

    def faults(self, subject: Subject) -> Iterator[Finding]:
        """Why the trainer would not start from this checkpoint."""
        settings = self._table("checkpoint")
        wanted = self._path("checkpoint", "initial_load_path")
        where = [f"{self.file}: [checkpoint]"]
        if not any(settings.get(name) is True for name in _ENABLED):
            yield one("initial-load-off", where, "enable = true", "checkpointing is off, and with it every load")
        elif not self.names_a_checkpoint:
            pass  # it may be given as a flag
        elif wanted is None or wanted.resolve() != subject.path.resolve():
            found = f"initial_load_path = {settings['initial_load_path']!r}"
            yield one("another-checkpoint-loaded", where, str(subject.path.resolve()), found)
        yield from self._folder(settings)
        # Settings that only newer versions have tell which layout will be looked for.
        if any(name in settings for name in _NEW_NAMES) and subject.opened.layout == "nested":
            yield one(
                "wrong-layout",
                [str(subject.path)],
                "flat: <name>, as TorchTitan 0.2 and later load",
                "nested: model.<name>",
            )

    def _folder(self, settings: Mapping[str, Any]) -> Iterator[Finding]:
        """TorchTitan up to 0.2 takes an existing folder of its own, even an empty one, for a run to resume."""
        # The defaults of TorchTitan.
        folder = settings.get("folder", "checkpoint")
        dump = self._table("job").get("dump_folder", "./outputs")
        if not isinstance(folder, str) or not isinstance(dump, str):
            return
        place = self._found(f"{dump}/{folder}")
        if place is not None and place.is_dir():
            steps = sorted(path.name for path in place.iterdir())
            found = f"it is there, with {', '.join(steps)}" if steps else "it is there, and empty"
            yield one("initial-load-skipped", [str(place)], "no such folder before the first start", found)

    def _table(self, name: str) -> Mapping[str, Any]:
        table = self.content.get(name)
        return table if isinstance(table, dict) else {}

    def _path(self, table: str, name: str) -> Path | None:
        value = self._table(table).get(name)
        return self._found(value) if isinstance(value, str) and value else None

    def _found(self, text: str) -> Path | None:
        """A path as the trainer sees it from where it is started: here, or where the settings lie."""
        # The trainer starts in another directory, perhaps; the one of its settings is the likeliest.
        try:
            places = (Path(text), self.file.parent / text)
            return next((place for place in places if place.exists()), None)
        except (OSError, ValueError):  # no name of a file
            return None
