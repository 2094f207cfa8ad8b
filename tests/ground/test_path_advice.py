"""What is said of a path that does not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardsmith.formats.by_path import detect_checkpoint_format
from shardsmith.ground.extras import EXTRAS, install_line
from shardsmith.ground.path_advice import not_there


def test_names_like_the_missing_one_are_listed(tmp_path: Path) -> None:
    for name in ("step-20", "step-25", "other"):
        (tmp_path / name).mkdir()
    assert str(not_there(tmp_path / "step-99")) == (
        f"{tmp_path}/step-99: there is no such file or directory; similar names there: step-20, step-25"
    )


def test_nothing_is_listed_where_no_name_is_alike(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert str(not_there(tmp_path / "step-99")).endswith("there is no such file or directory")


def test_a_missing_folder_above_is_named(tmp_path: Path) -> None:
    error = not_there(tmp_path / "rnu" / "step-5", "directory", "name another one")
    assert str(error).endswith(
        f"there is no such directory; the folder {tmp_path / 'rnu'} does not exist either; name another one"
    )


def test_names_are_fit_for_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "step-2\x1b[31m").mkdir()
    assert "\x1b" not in str(not_there(tmp_path / "step-25"))


def test_a_folder_that_may_not_be_listed_is_no_other_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert str(not_there(tmp_path / "step-99")).endswith("there is no such file or directory")


def test_a_detection_says_so(tmp_path: Path) -> None:
    (tmp_path / "step-5").mkdir()
    with pytest.raises(FileNotFoundError, match="similar names there: step-5"):
        detect_checkpoint_format(tmp_path / "step-6")


def test_packages_are_installed_by_their_extras_where_they_have_one() -> None:
    assert install_line("transformers", "accelerate") == "pip install 'shardsmith[transformers,accelerate]'"
    assert install_line("transformers", "huggingface_hub") == "pip install 'shardsmith[transformers]'"
    assert install_line("diffusers") == "pip install diffusers"
    assert all(f"'shardsmith[{extra}]'" in install_line(package) for package, extra in EXTRAS.items())


def test_a_link_that_leads_nowhere_is_called_so(tmp_path: Path) -> None:
    link = tmp_path / "step-4"
    link.symlink_to("/nowhere/archive")
    assert str(not_there(link)) == f"{link}: is a link to /nowhere/archive, which does not exist"
