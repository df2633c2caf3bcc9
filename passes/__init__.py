"""Graph passes over Relax modules, one per file, named by what they do."""

import tvm_ffi

from rotquant_tvm import errors

# TVM calls passes through its own calling convention, which keeps the type of an exception if it knows it.
for _error in ("RotQuantError", "UsageError", "FormatError", "ModelError", "DeviceError"):
    tvm_ffi.register_error(_error, getattr(errors, _error))
