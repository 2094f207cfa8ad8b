"""A 128-bit digest per tensor that does not depend on how the tensor is sharded.

Take the tensor's bytes in row-major order, little-endian, as they stand in a safetensors file; append zero bytes up
to a multiple of 8; read them as unsigned 32-bit words ``u[0], u[1], ...``. The digest is the pair

    total    = sum of u[i]            mod 2**64
    weighted = sum of (i + 1) * u[i]  mod 2**64

written as 32 hexadecimal digits, total first. Both are sums over elements, so the digests of the boxes that make up a
tensor add up to the digest of the tensor, in any order and for any way of cutting.

Every change of one or two words and every exchange of two different words is found in a tensor of less than 32 GiB:
the words are half as wide as the sums, so nothing is lost to the modulus. It finds accidents; it does not stop
somebody who means to deceive. docs/format.md specifies it byte by byte.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardsmith.tensors.tensors import Chunk, Shape

_MASK = (1 << 64) - 1
_LOW_WORD = 0xFFFFFFFF
_ROW_WORDS = 2048  # the sums over the columns of a block stay in the first cache
_BLOCK_BYTES = 1 << 21  # large enough that calls cost little; with its scratch copy it stays in cache
_DEVICE_BLOCK_BYTES = 1 << 26  # on an accelerator each block is waited for, and there is no such cache
_HERE_BLOCK_BYTES = 1 << 20  # the same in numpy, whose calls cost less
_HALF = np.uint64(32)


Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Digest:
    """Digest of a tensor, or the share that a box of it contributes. ``a + b`` joins the shares of disjoint boxes."""

    total: int = 0
    weighted: int = 0

    def __add__(self, other: Digest) -> Digest:
        return Digest((self.total + other.total) & _MASK, (self.weighted + other.weighted) & _MASK)

    def __str__(self) -> str:
        return f"{self.total:016x}{self.weighted:016x}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Inverse of ``str``. Raises ValueError unless given 32 hexadecimal digits."""
        if not re.fullmatch("[0-9a-f]{32}", text):
            raise ValueError(f"not a digest of 32 hexadecimal digits: {text!r}")
        return cls(int(text[:16], 16), int(text[16:], 16))


def digest_tensor(tensor: Tensor) -> Digest:
    """Digest of a whole tensor of any shape, dtype, strides and device. No communication."""
    return digest_box(tensor, Chunk.whole(tuple(tensor.shape)), tuple(tensor.shape))


def digest_box(values: Tensor, box: Chunk, shape: Shape) -> Digest:
    """Return the share of one box in the digest of the global tensor.

    Args:
        values: The box's values, shape ``box.sizes``, any strides and device. Not changed.
        box: Where they stand in the global tensor.
        shape: Shape of the global tensor.
    """
    if box.numel == 0:
        return Digest()
    depth = _run_dimension(box, shape)
    starts = _run_starts(box, shape, depth)
    rows = plain_values(values).reshape(len(starts), -1).view(torch.uint8)
    starts = starts.to(rows.device) * values.element_size()
    if len(starts) == 1:
        return _digest_run(rows[0], int(starts[0]))
    return _digest_rows(rows, starts)


def digest_run(values: Tensor, first_element: int, look: Callable[[int, int], None] | None = None) -> Digest:
    """Return the share of a contiguous run that begins at a flat row-major index of the global tensor.

    Args:
        values: The elements of the run, on the CPU.
        first_element: Row-major index of the first element in the global tensor.
        look: What else is to be done with the values while they are in cache: called with the first byte and the end of
            each block of them before it is digested.
    """
    data = plain_values(values).reshape(-1).view(torch.uint8)
    return _digest_run(data, first_element * values.element_size(), look or _look_away)


def first_of_run(box: Chunk, shape: Shape) -> int | None:
    """Flat row-major index of a box's first element, if its elements lie side by side in the global tensor."""
    if math.prod(box.sizes[: _run_dimension(box, shape)]) != 1:
        return None
    first = 0
    for offset, size in zip(box.offsets, shape, strict=True):
        first = first * size + offset
    return first


def plain_values(values: Tensor) -> Tensor:
    """Return the values as they would stand in a file: contiguous, no conjugation or negation put off."""
    # torch keeps conjugation and negation as flags of a view: the memory has other bits than the values.
    plain = values.detach().resolve_conj().resolve_neg().contiguous()
    # of one element any strides are contiguous, but not for a view of another size
    return plain.as_strided(plain.shape, (1,) * plain.ndim) if plain.numel() == 1 else plain


def _run_dimension(box: Chunk, shape: Shape) -> int:
    """The outermost dimension below which the box covers the tensor's full extent."""
    # Inner dimensions that the box fills belong to one run; the first one that it does not fill does, too.
    depth = len(shape)
    while depth > 0 and box.sizes[depth - 1] == shape[depth - 1]:
        depth -= 1
    return max(0, depth - 1)


def _run_starts(box: Chunk, shape: Shape, depth: int) -> Tensor:
    """Flat index of the first element of each contiguous run of the box, in row-major order; int64."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    starts = torch.tensor([sum(o * s for o, s in zip(box.offsets, strides, strict=True))], device="cpu")
    for size, stride in zip(box.sizes[:depth], strides[:depth], strict=True):
        # Row-major: each further dimension multiplies the starts found so far.
        starts = (starts[:, None] + torch.arange(size, device="cpu") * stride).reshape(-1)
    return starts


def _look_away(begin: int, end: int) -> None:
    """Nothing else is to be done with the values."""


def _digest_run(data: Tensor, start: int, look: Callable[[int, int], None] = _look_away) -> Digest:
    """Share of consecutive bytes that begin at byte ``start`` of the tensor. ``data``: uint8, 1-D."""
    # numpy reads the memory of CPU tensors without a copy; a tensor on a device is summed there.
    if not data.is_cpu:
        return _digest_blocks(data, start, look)
    return _digest_here(data, start, look)


def _digest_here(data: Tensor, start: int, look: Callable[[int, int], None]) -> Digest:
    """As ``_digest_run``, on the CPU."""
    source, aligned = data.numpy(), data.data_ptr() % 8 == 0
    result, done, size = Digest(), 0, source.size
    moved: npt.NDArray[np.uint8] | None = None
    while done < size:
        # The first byte of the block has this place in its 64-bit word of the tensor, not of the block.
        lead = (start + done) % 8
        # The first block is shorter, so that all later ones begin at a word.
        stop = min(size, done + _HERE_BLOCK_BYTES - lead)
        look(done, stop)
        block = source[done:stop]
        tail = -(lead + len(block)) % 8
        # Only then are the bytes moved: zeros before and behind do not change the sums.
        if lead or tail or not aligned or done % 8:
            # One scratch buffer for all blocks; 16 bytes are room for the zeros at both ends.
            moved = np.empty(min(size, _HERE_BLOCK_BYTES) + 16, np.uint8) if moved is None else moved
            end = lead + len(block)
            moved[lead:end] = block
            moved[:lead] = moved[end : end + tail] = 0
            block = moved[: end + tail]
        # The block begins at a word now: its place counts in words from the start of the tensor.
        result += _digest_words_here(block.view(np.uint64), (start + done) // 8)
        done = stop
    return result


def _digest_words_here(words: Words, first: int) -> Digest:
    """Share of consecutive 64-bit words, of which this is the place of the first."""
    rows, rest = divmod(len(words), _ROW_WORDS)
    whole = rows * _ROW_WORDS
    result = Digest()
    if rows:
        bases = _places(rows) * np.uint64(_ROW_WORDS) + np.uint64(first)
        result += _sum_here(words[:whole].reshape(rows, _ROW_WORDS), bases)
    if rest:
        result += _sum_row(words[whole:], first + whole)
    return result


def _digest_blocks(data: Tensor, start: int, look: Callable[[int, int], None]) -> Digest:
    """As ``_digest_run``, on any device."""
    result = Digest()
    done = 0
    while done < len(data):
        block = data[done : done + _block_bytes(data) - (start + done) % 8]
        look(done, done + len(block))
        result += _digest_block(block, start + done)
        done += len(block)
    return result


def _block_bytes(data: Tensor) -> int:
    return _BLOCK_BYTES if data.is_cpu else _DEVICE_BLOCK_BYTES


def _digest_block(block: Tensor, start: int) -> Digest:
    """Share of at most a block of consecutive bytes, all but the last few as one matrix of words."""
    lead = start % 8
    if lead or block.storage_offset() % 8 or block.data_ptr() % 8:
        # Also copies: a view as int64 needs an offset and an address that are multiples of 8.
        block = torch.nn.functional.pad(block, (lead, 0))
    whole = len(block) // (8 * _ROW_WORDS) * (8 * _ROW_WORDS)
    result = Digest()
    first_word = start // 8
    if whole:
        words = block[:whole].view(torch.int64).view(-1, _ROW_WORDS)
        bases = torch.arange(len(words), device=block.device) * _ROW_WORDS + first_word
        result += _sum_block(words, bases)
    rest = block[whole:]
    if len(rest):
        words = torch.nn.functional.pad(rest, (0, -len(rest) % 8)).view(torch.int64)[None]
        result += _sum_block(words, torch.tensor([first_word + whole // 8], device=block.device))
    return result


def _digest_rows(rows: Tensor, starts: Tensor) -> Digest:
    """Share of many equally long runs. ``rows``: uint8 [n, length]; ``starts``: byte positions, int64 [n]."""
    if rows.storage_offset() % 8 or rows.data_ptr() % 8:
        rows = rows.clone()  # a part of a flat parameter may begin anywhere, a view of words may not
    leads = starts % 8
    if rows.shape[1] % 8 == 0 and not bool(leads.any()):
        return _digest_words(rows.view(torch.int64), starts // 8)
    result = Digest()
    # Runs with the same place in their first word are padded alike, and so are one matrix.
    for lead in leads.unique().tolist():
        (chosen,) = torch.nonzero(leads == lead, as_tuple=True)
        for index in chosen.split(max(1, _BLOCK_BYTES // rows.shape[1])):
            padding = (lead, -(lead + rows.shape[1]) % 8)
            words = torch.nn.functional.pad(rows[index], padding).view(torch.int64)
            result += _digest_words(words, starts[index] // 8)
    return result


def _digest_words(words: Tensor, bases: Tensor) -> Digest:
    """Share of rows of 64-bit words, int64 [n, k], block by block; row r begins at word ``bases[r]``, int64 [n]."""
    count = max(1, _block_bytes(words) // 8 // words.shape[1])
    blocks = zip(words.split(count), bases.split(count), strict=True)
    return sum((_sum_block(block, base) for block, base in blocks), Digest())


def _sum_block(words: Tensor, bases: Tensor) -> Digest:
    """Both sums over one block of 64-bit words, each of which holds two 32-bit ones, low half first.

    Word j has its halves at the 1-based positions 2j + 1 and 2j + 2. The sums over the low halves follow from those
    over the words and the high halves, mod 2**64, which is how two's complement wraps around.
    """
    if words.is_cpu:
        return _sum_here(words.numpy().view(np.uint64), bases.numpy().view(np.uint64))
    return _sum_on_device(words, bases)


def _sum_on_device(words: Tensor, bases: Tensor) -> Digest:
    """As ``_sum_block``; waits for the device once."""
    # int64 shifts copy the sign: the mask takes those bits away. Sums in int64 wrap around as those of uint64 do.
    high = (words >> 32).bitwise_and_(_LOW_WORD)
    # One transfer for all four numbers: each .tolist() waits for the device.
    return _combined(*torch.stack([*_sums(words, bases), *_sums(high, bases)]).tolist())


def _sum_here(words: Words, bases: Words) -> Digest:
    """As ``_sum_block``, in numpy: of few words, its calls cost a third of torch's."""
    return _combined(*_sums_here(words, bases), *_sums_here(words >> _HALF, bases))


def _sum_row(words: Words, first: int) -> Digest:
    """As ``_sum_here``, of one row: most tensors of some models have no more, so it is to take few calls."""
    places, high = _places(_ROW_WORDS)[: len(words)], words >> _HALF
    sum_words, sum_high = int(np.add.reduce(words)), int(np.add.reduce(high))
    place_words = int(np.dot(words, places)) + first * sum_words
    return _combined(sum_words, place_words, sum_high, int(np.dot(high, places)) + first * sum_high)


def _combined(sum_words: int, place_words: int, sum_high: int, place_high: int) -> Digest:
    # A word is low + 2**32 * high, so what is left of the words' sums are those of the low halves.
    sum_low = sum_words - (sum_high << 32)
    place_low = place_words - (place_high << 32)
    total = sum_low + sum_high
    # The sum of (2j + 1) * low[j] and (2j + 2) * high[j].
    weighted = 2 * (place_low + place_high) + sum_low + 2 * sum_high
    return Digest(total & _MASK, weighted & _MASK)


def _sums(words: Tensor, bases: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the words and sum of word times place. Marginal sums first: they are what a processor does fastest."""
    rows, columns = words.sum(1), words.sum(0)
    place = (rows * bases).sum() + (columns * torch.arange(len(columns), device=words.device)).sum()
    return rows.sum(), place


def _sums_here(words: Words, bases: Words) -> tuple[int, int]:
    """As ``_sums``."""
    rows, columns = words.sum(1), words.sum(0)
    return int(rows.sum()), int(np.dot(rows, bases)) + int(np.dot(columns, _places(len(columns))))


@functools.lru_cache(maxsize=64)
def _places(count: int) -> Words:
    return np.arange(count, dtype=np.uint64)
