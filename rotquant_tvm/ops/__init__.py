"""TensorIR definitions of the KV-cache operators, generic in the format."""
