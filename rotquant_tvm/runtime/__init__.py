"""Sessions over a compiled library: no torch and no compiler needed."""
