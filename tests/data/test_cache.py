from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.started import running
from xtrain.data import Dataset
from xtrain.data.cache import Ids, TokenCache
from xtrain.errors import RequestError

Opener = Callable[..., Dataset]


def pieces_of(*pieces: list[int]) -> Callable[[], Iterator[Ids]]:
    return lambda: (np.array(piece, np.int64) for piece in pieces)


def never() -> Iterator[Ids]:
    raise AssertionError("built again, though it was there")


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "facts")


# --- one process -------------------------------------------------------------------------------


def test_tokens_are_built_once_then_mapped(cache_folder: Path) -> None:
    built = TokenCache(cache_folder).tokens("k", 300, pieces_of([1, 2], [], [299]))
    found = TokenCache(cache_folder).tokens("k", 300, never)
    assert built.tokens.tolist() == found.tokens.tolist() == [1, 2, 299]
    assert built.content_hash == found.content_hash
    assert isinstance(found.tokens.base, np.memmap)
    assert entries(cache_folder) == ["k"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, "u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_the_smallest_type_that_holds_the_vocabulary_is_stored(
    cache_folder: Path, vocab_size: int, dtype: str
) -> None:
    tokens = TokenCache(cache_folder).tokens("k", vocab_size, pieces_of([0, vocab_size - 1])).tokens
    assert tokens.dtype == np.dtype(dtype)
    assert tokens.tolist() == [0, vocab_size - 1]


def test_no_tokens_can_be_stored_too(cache_folder: Path) -> None:
    for pieces in (pieces_of(), never):
        assert len(TokenCache(cache_folder).tokens("k", 257, pieces).tokens) == 0


def test_a_lock_that_cannot_be_opened_is_done_without(cache_folder: Path) -> None:
    """As another user's cannot, in a folder that several share."""
    (cache_folder / "k.lock").mkdir(parents=True)
    assert TokenCache(cache_folder).tokens("k", 257, pieces_of([1, 2])).tokens.tolist() == [1, 2]


def cut(entry: Path) -> None:
    os.truncate(entry / "tokens.bin", 2)  # one whole token of two


def lose(entry: Path) -> None:
    (entry / "tokens.bin").unlink()


def garble(entry: Path) -> None:
    (entry / "about.json").write_text('{"dtype": "<u2", "cou')


def misdescribe(entry: Path) -> None:
    (entry / "about.json").write_text(json.dumps({"dtype": [], "count": "many", "content_hash": None}))


@pytest.mark.parametrize("damage", [cut, lose, garble, misdescribe])
def test_a_damaged_entry_is_built_again(cache_folder: Path, damage: Callable[[Path], None]) -> None:
    cache = TokenCache(cache_folder)
    cache.tokens("k", 257, pieces_of([1, 2]))
    damage(cache_folder / "k")
    assert cache.tokens("k", 257, pieces_of([1, 2])).tokens.tolist() == [1, 2]
    assert cache.tokens("k", 257, never).tokens.tolist() == [1, 2]
    assert entries(cache_folder) == ["k"]


def test_a_builder_that_fails_leaves_nothing(cache_folder: Path) -> None:
    def failing() -> Iterator[Ids]:
        yield np.array([1])
        raise RequestError("not UTF-8")

    with pytest.raises(RequestError, match="not UTF-8"):
        TokenCache(cache_folder).tokens("k", 257, failing)
    assert entries(cache_folder) == []


def test_a_chosen_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    with pytest.raises(RequestError) as error:
        TokenCache(folder, required=True).tokens("k", 257, pieces_of([1]))
    assert str(error.value) == (
        f"the token cache {folder} cannot be written: Not a directory; set XTRAIN_CACHE to a folder that can"
    )


def test_without_a_chosen_folder_a_temporary_one_stands_in_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    cache = TokenCache(tmp_path / "file" / "cache", say=said.append)
    assert cache.tokens("k", 257, pieces_of([1])).tokens.tolist() == [1]
    assert said == [
        f"the token cache {tmp_path}/file/cache cannot be written: Not a directory; "
        "using a temporary folder for this run. Set XTRAIN_CACHE to keep the tokens."
    ]
    assert not cache.folder.is_relative_to(tmp_path / "file")


# --- facts about files -------------------------------------------------------------------------


def aged(path: Path, content: str, age_seconds: float = 3600) -> Path:
    path.write_text(content)
    then = time.time() - age_seconds
    os.utime(path, (then, then))
    return path


def test_a_fact_is_remembered_until_the_file_changes(tmp_path: Path, cache_folder: Path) -> None:
    cache = TokenCache(cache_folder)
    path = aged(tmp_path / "f", "one")
    assert cache.remember([path], "q", lambda: "first") == "first"
    assert cache.remember([path], "q", lambda: "second") == "first"
    assert cache.remember([path], "another question", lambda: "second") == "second"
    aged(path, "three")
    assert cache.remember([path], "q", lambda: "third") == "third"
    aged(path, "other", age_seconds=1800)
    assert cache.remember([path], "q", lambda: "fourth") == "fourth"


def test_a_fact_about_a_file_changed_just_now_is_not_remembered(tmp_path: Path, cache_folder: Path) -> None:
    path = aged(tmp_path / "f", "one", age_seconds=0)
    cache = TokenCache(cache_folder)
    assert cache.remember([path], "q", lambda: "first") == "first"
    assert cache.remember([path], "q", lambda: "second") == "second"


# --- through open_data -------------------------------------------------------------------------


def test_a_changed_text_is_seen_and_a_renamed_one_uses_the_cache(
    tmp_path: Path, opened: Opener, cache_folder: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 200)
    first = opened(source="text", path=str(path))
    path = path.rename(tmp_path / "renamed.txt")
    assert opened(source="text", path=str(path)).content_hash == first.content_hash
    assert len(entries(cache_folder)) == 1
    path.write_text("b" * 200)
    assert opened(source="text", path=str(path)).content_hash != first.content_hash
    assert len(entries(cache_folder)) == 2


def test_the_second_opening_reads_no_text(
    tmp_path: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = aged(tmp_path / "text.txt", "a" * 200)
    first = opened(source="text", path=str(path)).micro_batches(0, 0, 1)
    real_open = Path.open

    def guarded(self: Path, *args: str, **keys: str) -> object:
        assert self != path, "read again"
        return real_open(self, *args, **keys)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", guarded)
    again = opened(source="text", path=str(path)).micro_batches(0, 0, 1)
    assert [b.tokens.tolist() for b in first] == [b.tokens.tolist() for b in again]


# --- several processes -------------------------------------------------------------------------

BUILDER = textwrap.dedent("""
    import fcntl, sys, time
    from pathlib import Path
    import numpy as np
    from xtrain.data.cache import TokenCache

    folder, me, start, seconds = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4])

    def refuse(file, how):
        raise OSError("this file system has no locks")

    if sys.argv[5] == "False":
        fcntl.flock = refuse

    def pieces():
        (start.parent / f"built-by-{me}").touch()
        for number in range(20):
            yield np.full(1000, number)
            time.sleep(seconds / 20)

    (start.parent / f"ready-{me}").touch()
    while not start.exists():
        time.sleep(0.001)
    stored = TokenCache(folder).tokens("k", 257, pieces)
    print(stored.content_hash, int(stored.tokens.sum()), len(stored.tokens))
""")
EXPECTED_SUM = str(1000 * sum(range(20)))


def builder(
    folder: Path, name: str, start: Path, seconds: float, locks: bool = True
) -> AbstractContextManager[subprocess.Popen[str]]:
    command = [sys.executable, "-c", BUILDER, str(folder), name, str(start), str(seconds), str(locks)]
    return running(command, stdout=subprocess.PIPE)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def builds_of_three_at_once(folder: Path, start: Path, *, locks: bool) -> int:
    """Start three builders of one key together, check what they end with; how many of them built it."""
    names = ["one", "two", "three"]
    with ExitStack() as stack:
        builders = [stack.enter_context(builder(folder, name, start, 0.3, locks)) for name in names]
        wait_for(lambda: all((start.parent / f"ready-{name}").exists() for name in names))
        start.touch()
        outputs = [one.communicate(timeout=60)[0].split() for one in builders]
    assert outputs[0][1:] == [EXPECTED_SUM, "20000"]
    assert outputs[0] == outputs[1] == outputs[2]
    assert entries(folder) == ["k"]
    assert TokenCache(folder).tokens("k", 257, never).content_hash == outputs[0][0]
    return len(list(start.parent.glob("built-by-*")))


@pytest.mark.slow
def test_of_processes_that_start_at_once_one_builds_for_all(tmp_path: Path, cache_folder: Path) -> None:
    assert builds_of_three_at_once(cache_folder, tmp_path / "start", locks=True) == 1


@pytest.mark.slow
def test_without_file_locks_processes_build_side_by_side_unharmed(tmp_path: Path, cache_folder: Path) -> None:
    assert builds_of_three_at_once(cache_folder, tmp_path / "start", locks=False) >= 1


@pytest.mark.slow
def test_a_killed_builder_leaves_nothing_that_is_trusted_and_the_next_one_sweeps(
    tmp_path: Path, cache_folder: Path
) -> None:
    start = tmp_path / "start"
    start.touch()
    with builder(cache_folder, "one", start, seconds=600):  # left, it is killed
        wait_for((tmp_path / "built-by-one").exists)
    assert [name.startswith("k.building-") for name in entries(cache_folder)] == [True]
    assert TokenCache(cache_folder).tokens("other", 257, pieces_of([1])).tokens.tolist() == [1]
    assert entries(cache_folder) == ["other"]
    assert TokenCache(cache_folder).tokens("k", 257, pieces_of([1])).tokens.tolist() == [1]


@pytest.mark.slow
def test_a_living_builder_is_not_swept_and_is_waited_for(tmp_path: Path, cache_folder: Path) -> None:
    start = tmp_path / "start"
    start.touch()
    said: list[str] = []
    cache = TokenCache(cache_folder, say=said.append)
    with builder(cache_folder, "one", start, seconds=1.5) as living:
        wait_for((tmp_path / "built-by-one").exists)
        cache.tokens("other", 257, pieces_of([1]))
        assert len(list(cache_folder.glob("k.building-*"))) == 1
        assert str(int(cache.tokens("k", 257, never).tokens.sum())) == EXPECTED_SUM
        assert said == ["waiting for another process that prepares the same tokens"]
        assert living.communicate(timeout=60)[0].split()[1] == EXPECTED_SUM
