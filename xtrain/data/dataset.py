"""The data of a run, addressed: every batch is a formula of (seed, step, rank, size).

The token stream is cut into sequences of seq_len, targets shifted by one. The last share of them is held
out; the others, in an order keyed by (seed, epoch), are the endless stream of which global batch k has
positions k * G to (k + 1) * G - 1. Micro-batch m of data rank r holds the rows
[(m * size + r) * micro, + micro) of that, so the batch is the same set whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from xtrain.contract import IGNORED_TARGET, Batch
from xtrain.data.mapped import give_back_pages, read_at_random
from xtrain.data.order import Mask, Permutation
from xtrain.data.sources import TokenStream, open_stream
from xtrain.errors import RequestError, RunFailed
from xtrain.spec.tree import Spec


def open_data(spec: Spec, *, show_progress: bool) -> Dataset:
    """The data of `spec`, its tokens prepared first where no cache has them.

    `show_progress`: a bar and what else a person should know go to standard error; for one process of a
    run. Raises RequestError for data that cannot be used, or is less than one global batch.
    """
    return Dataset(spec, open_stream(spec, show_progress=show_progress))


class Dataset:
    """Sequences of a token stream: those to train on, then those held out."""

    def __init__(self, spec: Spec, stream: TokenStream) -> None:
        self._spec = spec
        self._stream = stream
        self._seq_len = spec.data.seq_len
        self.vocab_size = stream.vocab_size
        """Symbols that the tokens may be: what the model must embed."""
        self.content_hash = stream.content_hash
        """SHA-256 of the tokens; begins with "sampled:" where only samples of a huge file were hashed."""
        self.portable = stream.portable
        """False where the same spec gives other tokens on another machine."""

        total = max(0, (len(stream.tokens) - 1) // self._seq_len)
        self.held_out_sequences = _held_out_count(total, spec.data.held_out)
        self.sequences = total - self.held_out_sequences
        """Sequences to train on: one epoch."""
        if self.sequences < spec.batch.global_:
            raise self._too_little(total)
        read_at_random(stream.tokens)
        self._order = Permutation(self.sequences, spec.train.seed)
        self._mask = Mask(spec.data.masked, spec.train.seed, self._seq_len) if spec.data.masked else None

    @property
    def description(self) -> str:
        """One line for people."""
        return (
            f"{self._stream.origin}, {len(self._stream.tokens):,} tokens, "
            f"{self.sequences + self.held_out_sequences:,} sequences of {self._seq_len}, "
            f"{self.held_out_sequences:,} held out"
        )

    def sequence_ids(self, step: int) -> NDArray[np.int64]:
        """The global batch of `step` (0-based): [batch.global], in order."""
        first = step * self._spec.batch.global_
        return self._order(np.arange(first, first + self._spec.batch.global_, dtype=np.int64))

    def micro_batches(self, step: int, data_rank: int, data_size: int) -> list[Batch]:
        """Rank `data_rank`'s share of the global batch of `step`, int64 [micro, seq_len] each.

        Raises ValueError when batch.global is not a multiple of micro x data_size, RunFailed when a file
        too large to be checked at the start holds an id beyond the vocabulary.
        """
        micro = self._spec.micro_batch
        accumulation = self._spec.accumulation(data_size)
        rows = self.sequence_ids(step).reshape(accumulation, data_size, micro)
        return [self._batch(ids) for ids in rows[:, data_rank]]

    def target_tokens(self, step: int) -> int:
        """Targets that count in the global batch of `step`: the same on every rank, reads no tokens."""
        if self._mask is None:
            return self._spec.batch.global_ * self._seq_len
        return int(np.count_nonzero(self._mask.counted(self.sequence_ids(step))))

    def held_out(self, data_rank: int, data_size: int) -> Sequence[Batch]:
        """Rank `data_rank`'s share of the held-out sequences, each once over all ranks, built when asked for.

        As many batches on every rank, [micro, seq_len] each: where sequences run out, all targets are
        IGNORED_TARGET.
        """
        micro = self._spec.micro_batch
        count = -(-self.held_out_sequences // (micro * data_size))

        def build(number: int) -> Batch:
            first = (number * data_size + data_rank) * micro
            ids = np.arange(first, min(first + micro, self.held_out_sequences), dtype=np.int64)
            return _padded(self._batch(ids + self.sequences), micro)

        return _LazyBatches(count, build)

    def _batch(self, ids: NDArray[np.int64]) -> Batch:
        shape = (len(ids), self._seq_len)
        tokens, targets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        stream = self._stream.tokens
        for row, first in enumerate((ids * self._seq_len).tolist()):
            tokens[row] = stream[first : first + self._seq_len]
            targets[row] = stream[first + 1 : first + self._seq_len + 1]
        if self._stream.unchecked is not None:
            self._check_range(ids, tokens, targets)
        if self._mask is not None:
            targets[~self._mask.counted(ids)] = IGNORED_TARGET
        give_back_pages(stream)
        return Batch(tokens, targets)

    def _check_range(self, ids: NDArray[np.int64], *parts: NDArray[np.int64]) -> None:
        for part in parts:
            wrong = (part < 0) | (part >= self.vocab_size)
            if wrong.any():
                row = int(wrong.any(axis=1).argmax())
                raise RunFailed(
                    f"{self._stream.unchecked} holds the id {part[wrong][0]} in sequence {ids[row]} "
                    f"(from token {ids[row] * self._seq_len:,} on); expected ids from 0 to "
                    f"{self.vocab_size - 1:,}, the vocabulary's last"
                )

    def _too_little(self, total: int) -> RequestError:
        batch, share = self._spec.batch.global_, self._spec.data.held_out
        needed = batch
        while (missing := batch - (needed - _held_out_count(needed, share))) > 0:
            needed += missing
        return RequestError(
            f"data: found {self._stream.origin}, {len(self._stream.tokens):,} tokens, which makes {total:,} "
            f"sequences of {self._seq_len}; batch.global {batch} with data.held_out {share:g} needs "
            f"{needed:,} sequences, {needed * self._seq_len + 1:,} tokens. "
            "Give more data, or lower batch.global or data.seq_len"
        )


class _LazyBatches(Sequence[Batch]):
    """`count` batches, each built when it is asked for."""

    def __init__(self, count: int, build: Callable[[int], Batch]) -> None:
        self._numbers = range(count)
        self._build = build

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self._build(number) for number in self._numbers[index]]
        return self._build(self._numbers[index])


def _held_out_count(total: int, share: float) -> int:
    """The share of `total` rounded down, but at least one where there are two and any is asked for."""
    return max(1, int(total * share)) if share > 0 and total >= 2 else 0


def _padded(batch: Batch, rows: int) -> Batch:
    missing = rows - len(batch.tokens)
    if missing == 0:
        return batch
    filler = np.zeros((missing, batch.tokens.shape[1]), np.int64)
    return Batch(
        np.concatenate([batch.tokens, filler]),
        np.concatenate([batch.targets, np.full_like(filler, IGNORED_TARGET)]),
    )
