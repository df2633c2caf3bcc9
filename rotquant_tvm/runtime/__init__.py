"""Sessions over a compiled library: no torch and no compiler needed.

``load(path)`` opens an artifact and starts a Session; ``load_library(path)`` keeps the library apart, for
several sessions over the same weights. Works in a process with ``TVM_USE_RUNTIME_LIB=1``.
"""

from rotquant_tvm.artifact_folder import check_output
from rotquant_tvm.runtime.artifact import Artifact, read_artifact, write_artifact
from rotquant_tvm.runtime.cache_info import KVCacheInfo, LayerInfo
from rotquant_tvm.runtime.codec_file import CodecData
from rotquant_tvm.runtime.generation import Generation, GenerationStream, TextChunk
from rotquant_tvm.runtime.library import CompiledLibrary, load, load_library
from rotquant_tvm.runtime.manifest import Manifest, TokenizerSpec
from rotquant_tvm.runtime.requirements import Requirements
from rotquant_tvm.runtime.sampling import SamplingConfig
from rotquant_tvm.runtime.session import Session

__all__ = [
    "Artifact",
    "CodecData",
    "CompiledLibrary",
    "Generation",
    "GenerationStream",
    "KVCacheInfo",
    "LayerInfo",
    "Manifest",
    "Requirements",
    "SamplingConfig",
    "Session",
    "TextChunk",
    "TokenizerSpec",
    "check_output",
    "load",
    "load_library",
    "read_artifact",
    "write_artifact",
]
