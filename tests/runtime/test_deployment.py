"""A process with TVM's runtime alone, without torch or compiler, loads an artifact and generates."""

from __future__ import annotations

import json
import os
import subprocess
import sys

SCRIPT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        blocked = ("torch", "transformers", "onnx", "networkx", "pandas")
        ours = ("passes", "ops", "frontend", "tuning", "schedules", "evaluation", "cli")
        if name.split(".")[0] in blocked or name.startswith(tuple("rotquant_tvm." + part for part in ours)):
            raise ModuleNotFoundError(f"{name} is not deployed", name=name)

sys.meta_path.insert(0, Blocker())

import json
from rotquant_tvm.runtime import load
import tvm

session = load(sys.argv[1])
result = session.generate("hello", 12)
chat = session.generate("hi", 3, chat=True, temperature=4.0, top_p=0.9)
print(json.dumps({
    "ids": result.ids, "text": result.text, "chat": chat.ids,
    "lengths": session.lengths.tolist(),
    "libraries": list(tvm.base._LOADED_LIBS),
    "modules": [name for name in sys.modules if name.split(".")[0] in ("torch", "transformers")
                or name.startswith("tvm.relax")],
}))
"""


def test_runtime_library_alone_is_enough(artifact, library, fake_model):
    environment = os.environ | {"TVM_USE_RUNTIME_LIB": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(artifact)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    expected = fake_model.reference_greedy(b"hello", 12)
    assert answer["ids"] == expected and answer["text"] == bytes(expected).decode()
    assert answer["chat"] == list(
        library.session().generate("hi", 3, chat=True, temperature=4.0, top_p=0.9).ids
    )
    assert answer["libraries"] == ["tvm_runtime"] and answer["modules"] == []
