"""Measurements behind ``tvmc bench``: kernels raced against their floor and against other libraries, in one run."""
