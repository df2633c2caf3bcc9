"""Tuning: MetaSchedule over the knobs of kernels laid out by hand, its logs, and how compiles use them."""
