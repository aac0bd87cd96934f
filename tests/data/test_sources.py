from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xtrain.contract import Batch
from xtrain.data import Dataset, text, tokenfile
from xtrain.data.sources import TokenStream, open_stream
from xtrain.errors import RequestError, RunFailed
from xtrain.spec.tree import Spec

SEPARATOR = 256


@pytest.fixture
def stream(make_spec: Callable[..., Spec]) -> Callable[..., TokenStream]:
    def open_with(**keys: Any) -> TokenStream:
        return open_stream(make_spec(**keys), show_progress=False)

    return open_with


Streams = Callable[..., TokenStream]


def refused(stream: Streams, **keys: Any) -> str:
    with pytest.raises(RequestError) as error:
        stream(**keys)
    return str(error.value)


# --- text --------------------------------------------------------------------------------------


def write(folder: Path, **files: bytes) -> list[str]:
    paths = [folder / f"{name}.txt" for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        path.write_bytes(content)
    return [str(path) for path in paths]


def test_documents_are_kept_apart_by_the_separator(tmp_path: Path, stream: Streams) -> None:
    paths = write(tmp_path, a=b"one\r\n", empty=b"", b="zwölf".encode(), c=b"")
    found = stream(source="text", path=paths)
    assert found.tokens.tolist() == [*b"one\r\n", SEPARATOR, *"zwölf".encode()]
    assert found.vocab_size == 257
    assert found.portable
    assert found.origin == "text: 4 files, 0.0 MB text"


def test_a_glob_is_sorted_and_a_list_keeps_its_order(tmp_path: Path, stream: Streams) -> None:
    b, a = write(tmp_path, b=b"b", a=b"a")
    assert stream(source="text", path=str(tmp_path / "*.txt")).tokens.tolist() == [*b"a", SEPARATOR, *b"b"]
    assert stream(source="text", path=[b, a]).tokens.tolist() == [*b"b", SEPARATOR, *b"a"]


def test_long_documents_are_read_in_blocks_that_do_not_show(
    tmp_path: Path, stream: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_BLOCK_BYTES", 4)
    content = "ab\n€€€€ no line end for a while €€\nlast".encode()
    paths = write(tmp_path, a=b"a", long=content, b=b"b")
    expected = [*b"a", SEPARATOR, *content, SEPARATOR, *b"b"]
    assert stream(source="text", path=paths).tokens.tolist() == expected


@pytest.mark.parametrize("block_bytes", [2, 3, 4, 5, 1000])
def test_bytes_that_are_not_utf8_are_named_with_file_and_place(
    tmp_path: Path, stream: Streams, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(text, "_BLOCK_BYTES", block_bytes)
    good, bad = write(tmp_path, good=b"fine", bad=b"caf\xc3\xa9 caf\xe9 au lait")
    assert refused(stream, source="text", path=[good, bad]) == (
        f"data.path: {bad} is not UTF-8: byte 0xe9 at offset 9 (invalid continuation byte); "
        "convert it, for example `iconv -f latin1 -t utf-8`"
    )


def test_a_character_cut_off_at_the_end_is_not_utf8(tmp_path: Path, stream: Streams) -> None:
    (path,) = write(tmp_path, cut=b"euro \xe2\x82")
    assert "byte 0xe2 at offset 5 (unexpected end of data)" in refused(stream, source="text", path=path)


def test_paths_that_name_no_file_are_refused(tmp_path: Path, stream: Streams) -> None:
    assert refused(stream, source="text") == (
        "data.path is missing: expected a file, a list of files, or a glob"
    )
    missing, nothing = str(tmp_path / "missing.txt"), str(tmp_path / "*.text")
    assert f"{missing} does not exist" in refused(stream, source="text", path=missing)
    assert f"{nothing} matches no file" in refused(stream, source="text", path=nothing)
    assert refused(stream, source="text", path=str(tmp_path)) == (
        f"data.path: {tmp_path} is a folder; name its files, such as {tmp_path}/**/*.txt"
    )


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path, stream: Streams) -> None:
    (path,) = write(tmp_path, a=b"text")
    model = {"preset": "gpt2-nano", "vocab_size": 256}
    assert refused(stream, source="text", path=path, model=model) == (
        "model.vocab_size: found 256, but the data (text: 1 file, 0.0 MB text) has 257 symbols; "
        "set it to 257 or more"
    )


@pytest.mark.parametrize("source", ["jsonl", "hf"])
def test_sources_of_later_are_refused_by_name(stream: Streams, source: str) -> None:
    assert refused(stream, source=source).startswith(f"data.source: {source} is not built yet")


# --- stdlib ------------------------------------------------------------------------------------


def test_stdlib_is_python_text_in_order_without_packages_and_capped() -> None:
    files = text.stdlib_files()
    assert files == sorted(files) == text.stdlib_files()
    assert {"ast.py", "abc.py"} <= {path.name for path in files}
    assert not any({"site-packages", "test"} & set(path.parts) for path in files)
    sizes = [path.stat().st_size for path in files]
    assert sum(sizes[:-1]) < text.STDLIB_BYTES


def test_stdlib_is_not_portable_and_says_what_it_is(stream: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "STDLIB_BYTES", 100_000)
    found = stream(source="stdlib")
    assert not found.portable
    assert found.origin.startswith("stdlib: ")
    assert bytes(found.tokens[:20].astype(np.uint8)) == text.stdlib_files()[0].read_bytes()[:20]


def test_stdlib_takes_files_that_are_not_utf8(
    tmp_path: Path, stream: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert bytes(stream(source="stdlib").tokens.astype(np.uint8)) == "# caf�\n".encode()


def test_a_python_without_its_library_on_disk_is_told_what_to_use(
    tmp_path: Path, stream: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert "stdlib found no text" in refused(stream, source="stdlib")


# --- synthetic ---------------------------------------------------------------------------------


def test_synthetic_takes_its_length_and_the_models_vocabulary(stream: Streams) -> None:
    found = stream(tokens=5000, model={"preset": "gpt2-nano", "vocab_size": 40})
    assert (len(found.tokens), found.vocab_size, int(found.tokens.max())) == (5000, 40, 39)
    assert found.portable
    default = stream(tokens=None)
    assert (len(default.tokens), default.vocab_size) == (1_000_000, 257)


def test_synthetic_needs_three_symbols(stream: Streams) -> None:
    assert refused(stream, model={"preset": "gpt2-nano", "vocab_size": 2}) == (
        "model.vocab_size: found 2; the synthetic language needs 3 or more"
    )


# --- tokens ------------------------------------------------------------------------------------


def saved(path: Path, tokens: Any) -> str:
    np.save(path, tokens)
    return str(path)


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "i4", "u4", "i8", "u8"])
def test_any_integer_type_gives_the_same_tokens_and_hash(tmp_path: Path, stream: Streams, dtype: str) -> None:
    ids = np.arange(200) % 100
    reference = tmp_path / "reference.bin"
    ids.astype("<u2").tofile(reference)
    expected = stream(source="tokens", path=str(reference))
    found = stream(source="tokens", path=saved(tmp_path / "ids.npy", ids.astype(dtype)))
    assert found.tokens.tolist() == ids.tolist()
    assert found.content_hash == expected.content_hash
    assert found.vocab_size == expected.vocab_size == 100


def test_token_files_are_mapped_not_read(tmp_path: Path, stream: Streams) -> None:
    path = saved(tmp_path / "ids.npy", np.zeros(100, np.uint16))
    base = stream(source="tokens", path=path).tokens.base
    assert isinstance(base, np.memmap)


def test_ids_beyond_the_models_vocabulary_are_refused_at_the_start(tmp_path: Path, stream: Streams) -> None:
    path = saved(tmp_path / "ids.npy", np.array([1, 500, 2]))
    model = {"preset": "gpt2-nano", "vocab_size": 500}
    assert refused(stream, source="tokens", path=path, model=model) == (
        "model.vocab_size: found 500, but the data (tokens: ids.npy) has 501 symbols; set it to 501 or more"
    )
    model["vocab_size"] = 501
    assert stream(source="tokens", path=path, model=model).vocab_size == 501


def test_without_a_given_vocabulary_the_file_or_the_preset_has_it(tmp_path: Path, stream: Streams) -> None:
    path = saved(tmp_path / "ids.npy", np.array([1, 500, 2]))
    assert stream(source="tokens", path=path).vocab_size == 501
    assert stream(source="tokens", path=path, model={"preset": "gpt2"}).vocab_size == 50257


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((2, 3), np.int64), "holds int64 of shape (2, 3); expected integers of one dimension"),
        (np.zeros(3), "holds float64 of shape (3,); expected integers of one dimension"),
        (np.zeros(0, np.int64), "holds no tokens"),
        (np.array([3, -1]), "holds the id -1; token ids start at 0"),
    ],
)
def test_arrays_that_are_not_token_ids_are_refused(
    tmp_path: Path, stream: Streams, content: Any, message: str
) -> None:
    path = saved(tmp_path / "ids.npy", content)
    assert refused(stream, source="tokens", path=path) == f"data.path: {path} {message}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.npy", b"not an array", "is not a complete .npy file"),
        ("ids.npy", b"", "is not a complete .npy file"),
        ("ids.bin", b"abc", "has 3 bytes, not a whole number of 2-byte uint16 tokens"),
        ("ids.bin", b"", "holds no tokens"),
        ("ids.pt", b"", "source tokens expects .npy, or .bin of little-endian uint16"),
    ],
)
def test_files_that_are_not_token_files_are_refused(
    tmp_path: Path, stream: Streams, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refused(stream, source="tokens", path=str(tmp_path / name))


def test_several_token_files_are_refused(tmp_path: Path, stream: Streams) -> None:
    for name in ("a.npy", "b.npy"):
        saved(tmp_path / name, np.arange(3))
    assert "found 2 files" in refused(stream, source="tokens", path=str(tmp_path / "*.npy"))


# --- token files too large to be read whole ----------------------------------------------------


def test_a_ten_gigabyte_file_opens_by_samples_and_says_so(
    tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    path = tmp_path / "huge.bin"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 10 * 2**30)  # sparse: takes no room
    keys = {"source": "tokens", "path": str(path), "model": {"preset": "gpt2"}, "held_out": 0.0}
    data = opened(**keys)
    assert data.content_hash.startswith("sampled:")
    assert data.sequences == (5 * 2**30 - 1) // 10
    assert data.vocab_size == 50257
    assert int(data.micro_batches(10**6, 0, 1)[0].tokens.max()) == 0
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\1\0")
    assert opened(**keys).content_hash != data.content_hash


@pytest.fixture
def large_from_100_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenfile, "SCAN_BYTES", 100)
    monkeypatch.setattr(tokenfile, "_BLOCK_TOKENS", 16)


@pytest.mark.usefixtures("large_from_100_bytes")
def test_ids_of_a_large_file_are_checked_as_they_are_used(
    tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    ids = np.zeros(2001, np.int32)
    ids[1005] = 300  # between the samples, in sequence 100
    model = {"preset": "gpt2-nano", "vocab_size": 300}
    data = opened(source="tokens", path=saved(tmp_path / "ids.npy", ids), model=model)
    step = next(step for step in range(25) if 100 in data.sequence_ids(step))

    def batches(step: int) -> list[Batch]:
        return data.micro_batches(step, 0, 1)

    assert batches((step + 1) % 24)
    with pytest.raises(RunFailed) as error:
        batches(step)
    assert str(error.value) == (
        f"{tmp_path}/ids.npy holds the id 300 in sequence 100 (from token 1,000 on); "
        "expected ids from 0 to 299, the vocabulary's last"
    )


@pytest.mark.usefixtures("large_from_100_bytes")
def test_a_large_file_needs_a_vocabulary_from_the_spec(tmp_path: Path, stream: Streams) -> None:
    path = saved(tmp_path / "ids.npy", np.zeros(2001, np.int32))
    assert "model.vocab_size is missing" in refused(stream, source="tokens", path=path)
