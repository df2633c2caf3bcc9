"""The compile cache: what makes a new entry, damage, interruption, and how many stay."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np
import pytest

from rotquant_tvm import compile_cache, compiler
from rotquant_tvm.compile_cache import CompileCache, cache_folder, model_digest
from rotquant_tvm.errors import DeviceError, FormatError, ModelError, UsageError
from rotquant_tvm.kv_cache_config import KVCacheConfig, LayerFormats
from rotquant_tvm.process_locks import locked_file, locked_folder
from rotquant_tvm.runtime import read_artifact, write_artifact
from rotquant_tvm.runtime.cache_info import INFO_VERSION, LAYOUT_VERSION

LAYER = {"kv_heads": 1, "head_dim": 32, "k": "f16", "v": "f16", "tile_bytes": 4096}
INFO = {"version": INFO_VERSION, "layout_version": LAYOUT_VERSION, "layers": [LAYER], "vocab_size": 8}
ENDS = ("partial", "replaced", "replaced", "partial")
INFO |= {"max_position": 64, "dtype": "float32", "weights": ["weight_0000"]}


@dataclass
class FakeCompiled:
    """Stands for a compiled model: saves a small artifact whose library says how it was compiled."""

    what: str

    def save(self, path):
        weights = {"weight_0000": np.zeros(3, np.float32)}
        write_artifact(path, self.what.encode(), weights, kv_cache_info=INFO, target="llvm")


@pytest.fixture
def compiles(monkeypatch):
    """Replace import and compile; returns the list of what was compiled."""
    done = []

    def compile(model, config, target, *, input_shapes, capacity, progress):
        done.append((str(model), config.formats.name, capacity))
        return FakeCompiled(f"{model} {config} {capacity}")

    monkeypatch.setattr(compiler, "compile", compile)
    monkeypatch.setattr(compile_cache, "import_model", lambda path, dtype, every_logit: f"{path} {dtype} {every_logit}")
    return done


@pytest.fixture
def cache(tmp_path, compiles):
    return CompileCache(tmp_path / "cache")


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


def test_the_same_compile_is_done_once(cache, model, compiles):
    first, second = cache.artifact(model, "rq3"), cache.artifact(model, "rq3")
    assert (first.found, second.found) == (False, True) and first.path == second.path
    assert len(compiles) == 1 and read_artifact(second.path).path.parent == cache.folder


def test_weights_that_entries_have_in_common_lie_on_disk_once(cache, model, compiles):
    first, second = (cache.artifact(model, name).path for name in ("rq3", "iso3"))
    assert (first / "weights.safetensors").samefile(second / "weights.safetensors")
    assert not (first / "model.so").samefile(second / "model.so")


def test_another_process_finds_it(cache, model, compiles):
    assert not cache.artifact(model).found
    assert CompileCache(cache.folder).artifact(model).found


def test_a_copy_of_the_model_is_the_same_model(cache, model, compiles, tmp_path):
    (tmp_path / "copy.gguf").write_bytes(model.read_bytes())
    assert not cache.artifact(model).found and cache.artifact(tmp_path / "copy.gguf").found


def test_spellings_of_the_same_format_share_an_entry(cache, model, compiles):
    assert not cache.artifact(model, "rq3").found
    assert cache.artifact(model, "rq3/hurwitz3").found
    assert cache.artifact(model, KVCacheConfig.parse("rq3")).found


@pytest.mark.parametrize(
    "change",
    [
        {"kv_cache": "rq4"},
        {"kv_cache": "rq3/rq4"},
        {"kv_cache": KVCacheConfig.parse("rq3", seed=1)},
        {"kv_cache": KVCacheConfig(LayerFormats.parse("rq3"), quantize_chunk=True)},
        {"kv_cache": "rq3,sinks=7"},
        {"every_logit": True},
        {"input_shapes": {"ids": [1, -1]}},
        {"kv_layers": "0=f16"},
        {"kv_layers": "-1=f16"},
        {"capacity": 64},
        {"dtype": "float16"},
        {"target": "llvm -mcpu=x86-64-v3"},
    ],
)
def test_whatever_decides_the_result_makes_a_new_entry(cache, model, compiles, change):
    first = cache.artifact(model, "rq3")
    second = cache.artifact(model, **{"kv_cache": "rq3"} | change)
    assert not second.found and second.path != first.path and len(compiles) == 2


def test_dynamic_shapes_are_the_usual_ones(cache, model, compiles):
    assert not cache.artifact(model, input_shapes={"ids": [-1, -1]}).found and cache.artifact(model).found
    assert not cache.artifact(model, input_shapes={"ids": [2, -1]}).found
    assert not cache.artifact(model, input_shapes={"ids": [3, -1]}).found


def test_other_content_versions_or_sources_make_a_new_entry(cache, model, compiles, monkeypatch):
    cache.artifact(model)
    model.write_bytes(b"other weights")
    assert not cache.artifact(model).found
    monkeypatch.setattr(compile_cache.importlib.metadata, "version", lambda _package: "9.9")
    assert not cache.artifact(model).found
    monkeypatch.setattr(compile_cache, "_SOURCES", ("rotquant_tvm.formats",))
    assert not cache.artifact(model).found
    assert cache.artifact(model).found and len(compiles) == 4


def test_the_digest_of_a_directory_is_over_names_and_contents(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    seen = set()
    for name, content in (("a", b"1"), ("b", b"1"), ("b", b"2")):
        (folder / name).write_bytes(content)
        seen.add(model_digest(folder))
    (folder / "a").rename(folder / "c")
    seen.add(model_digest(folder))
    assert len(seen) == 4 and model_digest(folder) in seen
    with pytest.raises(ModelError, match="missing"):
        model_digest(tmp_path / "missing")


def test_the_digest_of_an_onnx_model_is_over_its_data_and_tokenizer_too(tmp_path):
    onnx = pytest.importorskip("onnx")
    weight = onnx.numpy_helper.from_array(np.arange(4096, dtype=np.float32), "w")
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4096])
    graph = onnx.helper.make_graph([node], "g", [], [output], [weight])
    file = tmp_path / "model.onnx"
    model = onnx.helper.make_model(graph)
    onnx.save_model(model, file, save_as_external_data=True, location="model.data", size_threshold=0)
    seen = [model_digest(file)]
    content = bytearray((tmp_path / "model.data").read_bytes())
    content[9] ^= 1
    (tmp_path / "model.data").write_bytes(content)
    seen.append(model_digest(file))
    (tmp_path / "tokenizer.json").write_text("{}")
    seen.append(model_digest(file))
    assert len(set(seen)) == 3
    (tmp_path / "unrelated.bin").write_bytes(b"1")
    assert model_digest(file) == seen[-1]


def _flip(path):
    content = bytearray((path / "model.so").read_bytes())
    content[0] ^= 1
    (path / "model.so").write_bytes(content)


def _replace_by_a_file(path):
    for entry in path.iterdir():
        entry.unlink()
    path.rmdir()
    path.write_text("x")


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        _replace_by_a_file,
        lambda path: (path / "manifest.json").write_text('{"for'),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "weights.safetensors").write_bytes(b""),
    ],
)
def test_a_damaged_entry_is_compiled_again(cache, model, compiles, damage):
    first = cache.artifact(model)
    damage(first.path)
    stages = []
    with pytest.warns(UserWarning, match=r"damaged and is made again: .*" + first.path.name):
        again = cache.artifact(model, progress=stages.append)
    assert not again.found and again.path == first.path and len(compiles) == 2
    assert sum("made again" in stage for stage in stages) == 1
    assert cache.artifact(model).found


def test_only_the_newest_entries_stay(tmp_path, model, compiles):
    cache = CompileCache(tmp_path / "cache", keep=3)
    paths = [cache.artifact(model, capacity=10 + i).path for i in range(3)]
    for age, path in enumerate(paths):
        os.utime(path, (1000 + age, 1000 + age))
    assert cache.artifact(model, capacity=10).found  # used now, so the second is the oldest
    newest = cache.artifact(model, capacity=99).path
    assert set(cache.folder.iterdir()) == {paths[0], paths[2], newest}


def test_leftovers_of_interrupted_compiles_are_removed_in_time(cache, model, compiles):
    killed, old, retired, running = (f".{c * 64}.0123abcd.{end}" for c, end in zip("abcd", ENDS, strict=True))
    lock, held = f".{'e' * 64}.lock", f".{'f' * 64}.lock"
    for name, age in ((killed, 60), (old, 3 * 86400), (retired, 60)):
        (cache.folder / name).mkdir(parents=True)
        os.utime(cache.folder / name, (time.time() - age,) * 2)
    (cache.folder / lock).touch()
    with locked_folder(cache.folder / running), locked_file(cache.folder / held, lambda: None):
        kept = cache.artifact(model).path
        assert set(cache.folder.iterdir()) == {kept, *(cache.folder / name for name in (retired, running, held))}


def test_what_the_cache_did_not_write_is_left_alone(tmp_path, model, compiles):
    cache = CompileCache(tmp_path / "cache", keep=1)
    foreign = {cache.folder / name for name in ("notes.txt", ".hidden", ".mine.partial", "A" * 64, "a" * 63, "a" * 65)}
    folder = cache.folder / "thesis"
    folder.mkdir(parents=True)
    (folder / "chapter").write_text("mine")
    for path in foreign:
        path.write_text("mine")
    for path in (*foreign, folder):
        os.utime(path, (1000, 1000))
    entries = [cache.artifact(model, capacity=10 + i).path for i in range(3)]
    assert set(cache.folder.iterdir()) == {*foreign, folder, entries[-1]}
    assert (folder / "chapter").read_text() == "mine"


def test_without_a_compiler_nothing_is_imported(cache, model, compiles, monkeypatch):
    def absent():
        raise DeviceError("no C++ compiler")

    found = cache.artifact(model)
    monkeypatch.setattr(compile_cache, "linker_command", absent)
    monkeypatch.setattr(compile_cache, "import_model", lambda *_, **__: pytest.fail("imported"))
    assert cache.artifact(model).path == found.path  # what is there needs no compiler
    with pytest.raises(DeviceError):
        CompileCache(cache.folder).artifact(model, "rq4")


def test_a_failed_compile_leaves_nothing(cache, model, compiles, monkeypatch):
    def fail(*_arguments, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeCompiled, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        cache.artifact(model)
    assert not cache.folder.exists() or not list(cache.folder.iterdir())


def test_bad_arguments_are_refused_before_anything_is_compiled(cache, model, compiles, tmp_path):
    with pytest.raises(FormatError):
        cache.artifact(model, "iso9")
    with pytest.raises(UsageError, match="kv_layers"):
        cache.artifact(model, KVCacheConfig.parse("rq3"), kv_layers="0=f16")
    with pytest.raises(UsageError, match="seq is fixed"):
        cache.artifact(model, input_shapes={"ids": [1, 8]})
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="XDG_CACHE_HOME"):
        CompileCache(tmp_path / "file" / "cache").artifact(model)
    assert compiles == []


def test_progress_tells_the_stages(cache, model, compiles):
    stages = []
    cache.artifact(model, progress=stages.append)
    assert stages == ["look into the compile cache", "import", "write"]
    stages.clear()
    cache.artifact(model, capacity=9, progress=stages.append)
    assert "import" not in stages


def test_the_folder_follows_the_xdg_specification(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "rotquant_tvm"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == tmp_path / "home" / ".cache" / "rotquant_tvm"


def test_another_tuning_log_of_the_user_makes_another_entry(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    before = compile_cache.environment_digest()
    log = tmp_path / "rotquant_tvm" / "tuning_logs" / "nvidia-h100"
    log.mkdir(parents=True)
    (log / "manifest.json").write_text('{"format": "rotquant-tvm-tuning-log"}')
    first = compile_cache.environment_digest()
    (log / "trials").mkdir()
    (log / "trials" / "database_tuning_record.json").write_text("[]")
    assert compile_cache.environment_digest() == first != before  # trials decide nothing
    (log / "database_tuning_record.json").write_text("[]")
    assert compile_cache.environment_digest() not in (first, before)
