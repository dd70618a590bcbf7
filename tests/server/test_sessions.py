"""A folder of saved conversations that others delete from at the same time: no error of the server's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.server.generation import Refused
from headrace.server.sessions import SavedSessions


def test_a_session_that_goes_while_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept.session").write_bytes(b"abc")
    (tmp_path / "folder.session").mkdir()
    (tmp_path / "gone.session").write_bytes(b"")
    (tmp_path / "loop.session").symlink_to("loop.session")
    is_file = Path.is_file

    def was_file(path: Path) -> bool:
        found = is_file(path)
        (tmp_path / "gone.session").unlink(missing_ok=path.stem != "gone")
        return found

    monkeypatch.setattr(Path, "is_file", was_file)
    assert [(each["name"], each["bytes"]) for each in SavedSessions(tmp_path)] == [("kept", 3)]


def test_a_session_that_goes_before_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.session").write_bytes(b"")
    with pytest.raises(Refused, match="there is no session 'a'") as refused, SavedSessions(tmp_path).file("a") as path:
        path.unlink()
        path.unlink()  # as a second request's would
    assert refused.value.status == 404


def test_a_folder_that_goes_while_a_session_is_saved_is_told_as_it_is(tmp_path: Path) -> None:
    saved = SavedSessions(tmp_path / "gone")
    with pytest.raises(FileNotFoundError), saved.file("a", exists=False) as path:
        path.write_bytes(b"")
