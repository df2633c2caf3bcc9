"""Coverage-guided fuzzing of the readers with atheris (libFuzzer), by hand: ``pip install atheris``, then

    python -m tests.fuzz.coverage_guided words -runs=200000
    python -m tests.fuzz.coverage_guided logs -max_total_time=120

It tries what reaches new lines of rotquant_tvm, which Hypothesis does not look at. An input may end in a result or in a
documented error; anything else ends the run, and libFuzzer keeps the input. Further words are libFuzzer's options.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["rotquant_tvm"]):
    from rotquant_tvm.cache_policy import CachePolicy
    from rotquant_tvm.cli.config_file import expand_config
    from rotquant_tvm.cli.main import build_parser
    from rotquant_tvm.errors import RotQuantError
    from rotquant_tvm.formats import KVFormat
    from rotquant_tvm.input_shapes import parse_input_shapes
    from rotquant_tvm.kv_cache_config import KVCacheConfig
    from rotquant_tvm.runtime.cache_info import KVCacheInfo

    from . import test_logs, test_saved_caches

FOLDER = Path(tempfile.mkdtemp(prefix="fuzzed-"))
Attempt = Callable[[bytes], None]


def words(data: bytes) -> None:
    """Formats, cache configurations, policies, shapes."""
    text = data.decode("utf-8", "surrogateescape")
    for parse in (KVFormat.parse, KVCacheConfig.parse, CachePolicy.parse, parse_input_shapes):
        try:
            parse(text)
        except RotQuantError as error:
            assert str(error).strip()


def configs(data: bytes) -> None:
    """Option files: the first byte says which kind."""
    path = FOLDER / ("options.toml" if data[:1] < b"\x80" else "options.json")
    path.write_bytes(data[1:])
    _, commands = build_parser()
    try:
        expand_config(["compile", "m", "--config", str(path)], commands)
    except RotQuantError as error:
        assert str(error).strip()


def logs(data: bytes) -> None:
    """Tuning logs: the first byte says which of their files it is."""
    names = sorted(test_logs.FILES)
    test_logs.write(FOLDER, **{names[data[0] % len(names)] if data else names[0]: data[1:]})
    test_logs.use(FOLDER)


def sessions(data: bytes) -> None:
    """Saved caches."""
    path = FOLDER / "cache"
    path.write_bytes(data)
    test_saved_caches.take_up(path, test_saved_caches.arrays())


def infos(data: bytes) -> None:
    """What a library says of its cache."""
    try:
        KVCacheInfo.from_json(data.decode("utf-8", "replace"))
    except RotQuantError as error:
        assert str(error).strip()


def seeds(name: str) -> list[bytes]:
    """Valid inputs to begin with."""
    if name == "logs":
        return [bytes([n]) + test_logs.FILES[file].encode() for n, file in enumerate(sorted(test_logs.FILES))]
    if name == "sessions":
        path = FOLDER / "valid"
        test_saved_caches.save_cache(path, test_saved_caches.filled(), test_saved_caches.arrays(), "a" * 64)
        return [path.read_bytes()]
    if name == "infos":
        return [json.dumps(test_saved_caches.INFO).encode()]
    if name == "configs":
        return [b'\0kv-cache = "rq3"\n[compile]\ntarget = "llvm"\n', b'\xff{"compile": {"kv-cache": "rq3"}}']
    return [b"hurwitz3:ip+tcq/q8_0", b"rq3,sinks=4,recent=64,center=64,defer=32", b"ids:[2,-1]", b"0=f16;-1=iso4"]


ATTEMPTS: dict[str, Attempt] = {each.__name__: each for each in (words, configs, logs, sessions, infos)}


def main() -> None:
    """``NAME`` of an attempt, then libFuzzer's options."""
    name, *options = sys.argv[1:]
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(name)):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], *options, str(corpus)], ATTEMPTS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
