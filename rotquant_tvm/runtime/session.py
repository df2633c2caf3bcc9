"""A session: one KV cache over a compiled library, filled by prefill and decode."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm

from rotquant_tvm.errors import KVCacheFull, UsageError
from rotquant_tvm.runtime.cache_arrays import CacheArrays
from rotquant_tvm.runtime.cache_file import save_cache
from rotquant_tvm.runtime.cache_info import KVCacheInfo
from rotquant_tvm.runtime.decode_graph import DecodeGraph
from rotquant_tvm.runtime.device import device_errors
from rotquant_tvm.runtime.forks import check_fork
from rotquant_tvm.runtime.generation import Generation, GenerationConfig, GenerationStream, TextChunk
from rotquant_tvm.runtime.prompts import Chat, Prompt, prompt_rows
from rotquant_tvm.runtime.sampling import SamplingConfig
from rotquant_tvm.runtime.stopping import stop_strings
from rotquant_tvm.runtime.token_rows import chunks, joined_logits, token_row, token_rows

if TYPE_CHECKING:
    from rotquant_tvm.runtime.library import CompiledLibrary

DEFAULT_CHUNK = 512


class Session:
    """Sequences that grow in one KV cache; made by ``load`` or ``CompiledLibrary.session``.

    ``capacity`` is the most tokens that a sequence may hold; ``chunk`` the most tokens per sequence that one
    call into the library takes. A session belongs to one thread at a time; sessions of one library are
    independent of each other.
    """

    def __init__(self, library: CompiledLibrary, cache: CacheArrays, capacity: int, chunk: int) -> None:
        self.library = library
        self.capacity = capacity
        self.chunk = chunk
        self._cache = cache
        self._machine = library.virtual_machine()
        self._instrumented = False
        self._stepped: CacheArrays | None = None
        self._graph: DecodeGraph | None = None

    @property
    def info(self) -> KVCacheInfo:
        """Formats and shapes of the cache."""
        return self.library.info

    @property
    def report(self) -> Mapping[str, Any]:
        """The report of the compile."""
        return self.library.report

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self._cache.batch

    @property
    def lengths(self) -> np.ndarray:
        """Tokens held per sequence, int32 [batch]."""
        return self._cache.lengths

    @property
    def cache(self) -> CacheArrays:
        """The arrays that hold keys, values and lengths."""
        return self._cache

    def kv_bytes(self) -> int:
        """Bytes of the arrays that hold keys and values, as they are allocated now."""
        return self._cache.nbytes

    def prefill(self, ids: object) -> np.ndarray:
        """Append tokens to every sequence and return the logits after the last of them.

        ``ids``: integers [batch, s], or one list per sequence of any lengths, 0 included (a flat list if
        batch is 1). Returns float32 [batch, vocab]; the row of a sequence without new tokens is NaN, and so is that of
        one which the model gave a NaN for anywhere on the way (crop to the length before to go on). Raises
        UsageError for ids outside the vocabulary, a wrong number of rows or no token at all, KVCacheFull if
        the tokens do not fit, DeviceError if the device fails. After an error no new token is held; with a
        cache policy a call that failed midway may cost tokens that had just left the ring, and with layers that keep
        only a window it may empty sequences: see ``lengths``.
        """
        rows, _ = self._new_rows("prefill", ids)
        logits = np.full((self.batch, self.info.vocab_size), np.nan, np.float32)
        broken = np.zeros(self.batch, bool)
        with self._cache.unchanged_on_error():
            for chunk_ids, chunk_lengths in chunks(rows, self.chunk):
                result = self._run("prefill", chunk_ids, chunk_lengths)
                self._cache.advance(chunk_lengths)
                taken = chunk_lengths > 0
                logits[taken] = result[taken]
                broken |= taken & np.isnan(result).any(axis=1)
        logits[broken] = np.nan  # later chunks do not show it: what is stored of a NaN is 0
        return logits

    def verify(self, ids: object) -> np.ndarray:
        """Append tokens to every sequence, as ``prefill`` does, and return the logits after each of them.

        For speculative decoding: append a draft in one call, compare, and ``crop`` what is rejected. Tokens of one call
        see each other as stored (without a cache policy) or unquantized (with one). Returns float32 [batch, s, vocab],
        s that of the longest row (4 · s · vocab bytes per sequence); it is NaN behind the end of a shorter row, and
        from the first NaN on that the model gave. Raises as ``prefill``, and UsageError if the library was compiled
        without ``every_logit``.
        """
        self.library.check_every_logit()
        rows, new_lengths = self._new_rows("verify", ids)
        parts = []
        with self._cache.unchanged_on_error():
            for chunk_ids, chunk_lengths in chunks(rows, self.chunk):
                parts.append(self._run("verify", chunk_ids, chunk_lengths))
                self._cache.advance(chunk_lengths)
            return joined_logits(parts, new_lengths)

    def decode(self, ids: object, active: Sequence[bool] | np.ndarray | None = None) -> np.ndarray:
        """Append one token to every sequence and return the logits after it.

        ``ids``: integers [batch] or [batch, 1]. ``active``: bool [batch]; a sequence that is not active keeps
        its tokens and length, and its logits mean nothing. Returns float32 [batch, vocab]. Raises as
        ``prefill`` does. With a cache policy, steps of some sequences only run as a prefill of one token each.
        """
        values = np.asarray(ids)
        if values.shape not in ((self.batch,), (self.batch, 1)):
            raise UsageError(f"decode takes ids of shape [{self.batch}], not {list(values.shape)}")
        tokens = token_row(values.reshape(-1), self.info.vocab_size)[:, None]
        taking = np.ones(self.batch, bool) if active is None else np.asarray(active)
        if taking.dtype != bool or taking.shape != (self.batch,) or not taking.any():
            raise UsageError(f"active needs {self.batch} truth values, at least one of them true")
        lengths = self.lengths
        self.check_room(lengths + taking)
        with self._cache.unchanged_on_error():
            # Decode appends to every sequence. A full one has no slot for a token to be taken back, and in a 16-bit
            # ring it may push others out.
            waiting = bool((lengths[~taking] >= self.capacity).any()) or self._cache.policy.segmented
            alone = waiting and not taking.all()
            logits = self._run("prefill", tokens, taking) if alone else self._step(tokens)
            if alone or taking.all():
                self._cache.advance(taking, chunk=alone)
            else:
                self._cache.advance(np.ones(self.batch, np.int32), chunk=False)
                self._cache.set_lengths(lengths + taking)
        return logits

    def generate(
        self,
        prompt: Prompt | None = None,
        max_tokens: int | None = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = 0,
        stop: str | Sequence[str] = (),
        chat: Chat = False,
        stream: Callable[[TextChunk], object] | None = None,
        reset: bool = True,
    ) -> Generation | list[Generation]:
        """Continue one prompt, or several at once, and return what was generated.

        ``prompt``: a text, token ids, or a list of either; the session takes on as many sequences as there
        are prompts. ``max_tokens``: None for as many as fit. ``temperature`` 0 is greedy; ``top_p`` and
        ``seed`` as in SamplingConfig. ``stop``: texts that end a sequence. ``chat``: True to put
        each text to the model's chat template, or a conversation in place of ``prompt``. ``stream`` is called
        with every TextChunk. ``reset``: forget what the session holds first; else the prompts continue
        its sequences.

        Returns a Generation, or a list if a list of prompts was given. Afterwards the cache holds each
        prompt and its new tokens but the last, which was not fed: to go on, put that token before the next
        prompt. Raises UsageError for bad arguments, KVCacheFull before anything runs if prompt and
        ``max_tokens`` do not fit.
        """
        generated = self.stream(prompt, max_tokens, temperature, top_p, seed, stop, chat, reset)
        for chunk in generated:
            if stream is not None:
                stream(chunk)
        return generated.results[0] if generated.single else generated.results

    def stream(
        self,
        prompt: Prompt | None = None,
        max_tokens: int | None = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = 0,
        stop: str | Sequence[str] = (),
        chat: Chat = False,
        reset: bool = True,
    ) -> GenerationStream:
        """Like ``generate``, as an iterator over TextChunks whose ``results`` are complete at its end."""
        config = GenerationConfig(max_tokens, stop_strings(stop), SamplingConfig(temperature, top_p, seed))
        rows, single = prompt_rows(prompt, chat, self.library.tokenizer, self.info.vocab_size)
        return GenerationStream(self, rows, config, reset, single)

    def check_room(self, lengths: np.ndarray) -> None:
        """Raise KVCacheFull, which names the longest, unless sequences of these lengths, int [n], fit."""
        longest = int(np.argmax(lengths))
        needed = int(lengths[longest])
        if needed > self.capacity:  # which is at most the model's positions
            number = longest if len(lengths) > 1 else None
            raise KVCacheFull(self.capacity, needed, self.info.max_position, number)

    def reset(self, batch: int | None = None) -> None:
        """Forget all tokens; with ``batch``, go on with that number of sequences.

        Raises UsageError for a batch below 1 or one that the library was not compiled for, DeviceError if the
        other cache does not fit.
        """
        if batch is None or batch == self.batch:
            self._cache.set_lengths(np.zeros(self.batch, np.int32))
        else:
            self._cache = self.library.create_cache(batch, self.capacity)

    def crop(self, keep: int | Sequence[int] | np.ndarray) -> None:
        """Keep the first ``keep`` tokens of every sequence, or ``keep[i]`` of sequence i.

        One number leaves shorter sequences as they are. Raises UsageError for a negative number, for more tokens than
        are there and for fewer than ``shortest_crop`` where a layer keeps only its window.
        """
        self._cache.crop(keep)

    def shortest_crop(self) -> np.ndarray:
        """Return the least number of tokens, int [batch], that ``crop`` can keep of each sequence, none aside.

        It is 0 but where layers with a sliding window have given up tokens that the next one would see after a shorter
        crop (``window_ring``). The token of the last step can always be taken back.
        """
        return self._cache.shortest_crop()

    def fork(self) -> Session:
        """Return a session of its own that holds the same tokens; raises DeviceError if it does not fit."""
        return Session(self.library, self._cache.copy(), self.capacity, self.chunk)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens that the session holds to the file ``path``, for ``CompiledLibrary.restore``.

        The file has the packed cache as it is, cut to the tokens held. Raises UsageError if it cannot be written; the
        file is then as it was before.
        """
        used = self.library.create_cache(self.info.batch or 1, self._cache.tokens_in_use)
        save_cache(path, self._cache, used, self.library.identity)

    def reorder(self, indices: Sequence[int] | np.ndarray) -> None:
        """Make sequence i a copy of sequence ``indices[i]``.

        There may be more or fewer indices than sequences; the batch follows. Raises UsageError for an
        index that is no sequence and a batch that the library was not compiled for, DeviceError if a larger cache
        does not fit.
        """
        cache = self._cache.gather(indices)
        self.library.check_batch(cache.batch)
        self._cache = cache

    def instrument(self, callback: Callable[..., int]) -> None:
        """Have TVM call ``callback(function, symbol, before, result, *arguments)`` around every kernel.

        ``callback`` returns 0 to go on. It stays in place as long as the session; calls are slower with it.
        """
        self._machine.set_instrument(callback)
        self._instrumented = True

    def _new_rows(self, call: str, ids: object) -> tuple[list[np.ndarray], np.ndarray]:
        """Rows of new tokens and their lengths, once it is sure that they fit."""
        rows = token_rows(ids, self.batch, self.info.vocab_size)
        new_lengths = np.array([len(row) for row in rows])
        if not new_lengths.any():
            raise UsageError(f"{call} was given no token; pass at least one")
        self.check_room(self.lengths + new_lengths)
        return rows, new_lengths

    def _step(self, tokens: np.ndarray) -> np.ndarray:
        """Run decode: on CUDA the second step over a cache is recorded as a graph, which the others replay."""
        if self.library.device.type != "cuda" or self._instrumented or not self.library.info.recordable:
            return self._run("decode", tokens)
        if self._stepped is not self._cache:
            self._stepped, self._graph = self._cache, None
            return self._run("decode", tokens)
        device = self.library.device
        with device_errors(f"decode failed on {device}", "no new token is held; see the sequences' lengths"):
            if self._graph is None:
                self._graph = DecodeGraph(self.library, self._cache)
            return self._graph.step(tokens)

    def _run(self, function: str, *inputs: np.ndarray) -> np.ndarray:
        """Call the library with int32 inputs, the cache and the weights; returns its logits, float32."""
        check_fork()
        device = self.library.device
        with device_errors(f"{function} failed on {device}", "no new token is held; see the sequences' lengths"):
            tensors = [tvm.runtime.tensor(array.astype(np.int32), device) for array in inputs]
            result = self._machine[function](*tensors, *self._cache.tensors, *self.library.weights)
            logits: np.ndarray = result.numpy()
        return logits
