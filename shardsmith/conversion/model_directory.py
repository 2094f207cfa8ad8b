"""Where a model lies that is called by a path or by its name on the Hub, and what belongs to its tokenizer."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

from shardsmith.errors import CheckpointError, CheckpointNotFoundError
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.manifest.checkpoints import hash_file

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Weights of other libraries, and a second copy of the same ones: none of them is read here.
_OTHER_WEIGHTS = ["*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "original/*", "consolidated*"]
_TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "chat_template.*",
)


def find_model(name: str, *, fetch: bool = True) -> Path:
    """The directory of a model: a path, a URL, or a name on the Hub, from the local cache if it is there, else fetched.

    Args:
        name: A path, the URL of a place in an object store, or a name on the Hub.
        fetch: Whether to use the network at all.

    Raises:
        CheckpointNotFoundError: it is nothing of that kind.
    """
    path = as_path(name)
    # A local directory comes before a name of the Hub: both may look alike, such as "org/model".
    if path.exists():
        return path
    if isinstance(path, RemotePath):
        raise CheckpointNotFoundError(path, "there is nothing of that name")
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointNotFoundError(path, "there is no such file or directory, and it is no name of the Hub either")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointNotFoundError(
            path, "there is no such directory; for names of the Hub, pip install 'shardsmith[transformers]'"
        ) from None
    try:
        # The cache first, and without the network: it is asked only if the cache lacks something.
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # it is not in the cache, or only in part
        if not fetch:
            reason = f"is neither a directory nor a model in the Hugging Face cache; run: hf download {name}"
            raise CheckpointNotFoundError(path, reason) from error
        return _fetch(name)


def _fetch(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=_OTHER_WEIGHTS))
    except Exception as error:  # offline, no such model, no access: of a dozen types, some of them not its own
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise CheckpointNotFoundError(
            Path(name),
            f"there is no such directory, it is not in the Hugging Face cache ({constants.HF_HUB_CACHE}), and it could "
            f"not be fetched ({reason}). Give a local directory, or run: hf download {name}",
        ) from error


def hash_tokenizer(directory: Path) -> dict[str, str]:
    """XXH3-128 of each file of the tokenizer, by name; links of a Hugging Face cache are followed.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if not directory.is_dir():
        return {}
    names = sorted(path.name for path in directory.iterdir() if any(fnmatchcase(path.name, p) for p in _TOKENIZER))
    try:
        # A cache of the Hub holds links into a folder of blobs; ``hash_file`` follows none.
        return {name: hash_file((directory / name).resolve()) for name in names if (directory / name).is_file()}
    except OSError as error:
        raise CheckpointError(directory, f"a file of the tokenizer cannot be read: {error}") from error
