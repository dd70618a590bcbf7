"""push over a stand-in for adb: which commands run, and one line for whatever goes wrong."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from headrace.errors import TargetError
from headrace.targets.qualcomm.adb import push_commands, push_folder, run_command

# Writes its arguments down; `state` and `broken` beside it decide how it answers.
ADB = """#!/bin/sh
here=$(dirname "$0")
echo "$*" >> "$here/log"
if [ "$1" = get-state ]; then
    [ -f "$here/state" ] && cat "$here/state" && exit 0
    echo "error: no devices/emulators found" >&2
    exit 1
fi
case "$*" in
*part_2*) [ -f "$here/broken" ] && echo "first line" >&2 && echo "No space left on device" >&2 && exit 1 ;;
esac
exit 0
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "snapdragon-8-elite"
    made.mkdir()
    for name in ("part_1.bin", "part_2.bin", "genie config.json"):
        (made / name).write_text("x", encoding="utf-8")
    (made / "inner").mkdir()
    return made


@pytest.fixture
def adb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an adb that sees a phone."""
    place = tmp_path / "bin"
    place.mkdir()
    (place / "adb").write_text(ADB, encoding="utf-8")
    (place / "adb").chmod(0o755)
    (place / "state").write_text("device\n", encoding="utf-8")
    monkeypatch.setenv("PATH", str(place), prepend=":")
    return place


def log(adb: Path) -> list[str]:
    return (adb / "log").read_text(encoding="utf-8").splitlines()


def test_every_file_goes_to_its_place(adb: Path, folder: Path) -> None:
    place = "/data/local/tmp/headrace/river"
    names = ["genie config.json", "part_1.bin", "part_2.bin"]
    push_folder(push_commands(folder, "river"))
    assert log(adb) == [
        "get-state",
        f"shell mkdir -p {place}",
        *(f"push {folder / name} {place}/{name}" for name in names),
    ]
    command = run_command("river")
    assert command[:2] == ["adb", "shell"]
    assert command[2].startswith(f"cd {place} && export LD_LIBRARY_PATH=$PWD ADSP_LIBRARY_PATH=$PWD")
    assert command[2].endswith("./genie-t2t-run -c genie_config.json --prompt_file sample_prompt.txt")


@pytest.mark.parametrize("name", ["my river", "it's;reboot", "$(reboot)"])
def test_a_folder_name_is_one_word_to_the_phones_shell(folder: Path, name: str) -> None:
    # adb hands the phone's shell one string: what the shell makes of it must be the name again.
    make, *_ = push_commands(folder, name)
    assert shlex.split(" ".join(make[2:])) == ["mkdir", "-p", f"/data/local/tmp/headrace/{name}"]
    assert shlex.split(run_command(name)[2])[1] == f"/data/local/tmp/headrace/{name}"


def test_the_first_failure_ends_it(adb: Path, folder: Path) -> None:
    (adb / "broken").touch()
    with pytest.raises(TargetError, match=r"adb push .*part_2\.bin .* failed: No space left on device$"):
        push_folder(push_commands(folder, "river"))
    assert len(log(adb)) == 5


def test_no_device(adb: Path, folder: Path) -> None:
    (adb / "state").unlink()
    with pytest.raises(TargetError, match=r"adb sees no device \(error: no devices/emulators found\); connect a phone"):
        push_folder(push_commands(folder, "river"))
    (adb / "state").write_text("unauthorized\n", encoding="utf-8")
    with pytest.raises(TargetError, match=r"adb sees no device \(unauthorized\)"):
        push_folder(push_commands(folder, "river"))
    assert set(log(adb)) == {"get-state"}


def test_no_adb(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match=r"adb is not on PATH; .*--dry-run"):
        push_folder(push_commands(folder, "river"))
