"""``shardsmith push``: an export to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import tyro


def push(
    directory: tyro.conf.Positional[Path],
    repository: tyro.conf.Positional[str],
    revision: str = "step-{step}",
    public: bool = False,
    json: bool = False,
) -> int:
    """Upload an export to the Hugging Face Hub.

    Every byte is compared with what was exported before anything is sent. The files appear together, as one commit, and
    replace what the branch had. A push that was cut off goes on when the command is given again: files that the Hub has
    are not sent twice. The token is that of "hf auth login" or HF_TOKEN.

    Example: shardsmith push run/hf/step-500 org/name

    Args:
        directory: A directory that HFExport or to-hf has made, here or in an object store.
        repository: The repository, made if missing.
        revision: The branch, made if missing; "{step}" stands for the step that was exported.
        public: Make a repository that is missing public. Without it, it is private.
        json: Print JSON on one line.
    """
    from json import dumps

    from shardsmith.export.hub import push_export
    from shardsmith.ground.remote_path import as_path

    directory = as_path(directory)
    place = push_export(directory, repository, revision=revision, private=not public)
    print(dumps({"directory": str(directory), "url": place}) if json else f"pushed {directory} to {place}")
    return 0
