"""Folders of runs: complete or absent, used by one run at a time, and resumed after a kill."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenflow.errors import UserError
from tokenflow.runtime import run_folder
from tokenflow.runtime.run_folder import lock, open_run_folder, resume_folder, share, stage

ROOT = Path(__file__).parent.parent


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_staged_files_appear_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "folder"
    with pytest.raises(KeyError), stage(target) as unfinished:
        unfinished.mkdir()
        (unfinished / "file").write_text("half")
        raise KeyError
    assert not names_in(tmp_path)
    for content in ("first", "second"):
        with stage(target) as unfinished:
            unfinished.mkdir()
            (unfinished / content).write_text(content)
    assert [path.name for path in target.parent.rglob("*")] == ["folder", "second"]


def test_what_a_killed_run_was_replacing_goes(tmp_path):
    """It had put the old folder aside, and not yet the new one in its place."""
    (tmp_path / ".replaced-frames" / "old").mkdir(parents=True)
    for _ in range(2):
        with stage(tmp_path / "frames") as unfinished:
            unfinished.mkdir()
        assert names_in(tmp_path) == ["frames"]


def test_links_are_replaced_and_not_followed(tmp_path):
    """Also one that leads nowhere."""
    kept = tmp_path / "elsewhere" / "kept"
    kept.mkdir(parents=True)
    for target in (kept.parent, tmp_path / "nowhere"):
        (tmp_path / "link").symlink_to(target)
        with stage(tmp_path / "link") as unfinished:
            unfinished.mkdir()
        assert names_in(tmp_path) == ["elsewhere", "link"] and not (tmp_path / "link").is_symlink()
        run_folder.remove(tmp_path / "link")
    assert kept.is_dir()


def test_what_another_configuration_left_is_not_resumed(tmp_path):
    def interrupt(identity, error=KeyboardInterrupt, resume=True):
        with contextlib.suppress(error), resume_folder(tmp_path / "x", identity, resume) as folder:
            found = [name for name in names_in(folder) if name != ".run.json"]
            (folder / identity).touch()
            raise error
        return found

    assert [interrupt("a"), interrupt("a"), interrupt("b")] == [[], ["a"], []]
    assert interrupt("b", UserError) == ["b"] == interrupt("b")  # what an earlier run wrote stays
    assert interrupt("b", UserError, resume=False) == []
    assert not names_in(tmp_path)


def test_a_lock_dies_with_its_process(tmp_path):
    code = (
        f"import sys, os, pathlib; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tokenflow.runtime import run_folder\n"
        "with run_folder.lock(pathlib.Path('edit')): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == -9
    assert (tmp_path / ".lock-edit").exists()
    refused = pytest.raises(UserError, match=f"process {os.getpid()} on .* at work")
    with lock(tmp_path / "edit"), refused, lock(tmp_path / "edit"):
        pass
    assert not names_in(tmp_path)


def test_readers_share_a_folder_that_is_replaced_alone(tmp_path):
    folder = tmp_path / "inversion"
    folder.mkdir()
    refused = pytest.raises(UserError, match="inversion: another process, .* at work there")
    with share(folder), share(folder), refused, lock(folder):
        pass
    assert names_in(tmp_path) == [
        "inversion"
    ]  # readers need no file, which a read-only folder cannot have
    with lock(folder), pytest.raises(UserError, match=f"process {os.getpid()} on"), share(folder):
        pass
    with share(folder):
        pass


def claim(folder, config, error=None):
    """Open the folder of a run, and end it with an error; returns the folder's name."""
    with contextlib.suppress(KeyboardInterrupt), open_run_folder(folder, "clip", config) as opened:
        if error:
            raise error
    return opened.name


def test_run_folders_are_shared_by_equal_runs_only(tmp_path):
    names = [claim(tmp_path / "out", config) for config in ("a", "b", "a", "c", "b")]
    assert names == ["clip", "clip_2", "clip", "clip_3", "clip_2"]
    with pytest.raises(UserError):
        claim(tmp_path / "out", "d", UserError())
    assert names_in(tmp_path / "out") == sorted(set(names))


def test_a_mistake_removes_no_folder_of_an_earlier_run(tmp_path):
    assert claim(tmp_path, "a", KeyboardInterrupt()) == "clip"
    with pytest.raises(UserError):
        claim(tmp_path, "a", UserError())
    assert names_in(tmp_path) == ["clip"]


def test_the_run_that_comes_second_removes_nothing(tmp_path):
    """It finds the folder of an equal run, which is at work, and that of another one, which it passes by."""
    with open_run_folder(tmp_path, "clip", "a") as folder:
        with pytest.raises(UserError, match=f"process {os.getpid()} on"):
            claim(tmp_path, "a")
        assert claim(tmp_path, "b") == "clip_2"
        with open_run_folder(tmp_path, "clip", "a", is_main=False) as joined:
            assert joined == folder
    assert names_in(tmp_path) == ["clip", "clip_2"]


def test_what_killed_claims_left_does_not_block(tmp_path):
    """Also that of a process with the same id, such as another container's."""
    for name in (f".claim-clip-{os.getpid()}", ".partial-clip"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / ".lock-clip.claim").touch()
    assert claim(tmp_path, "a") == "clip"
    assert (tmp_path / "clip" / "config.yaml").read_text() == "a"
