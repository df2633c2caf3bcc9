"""What is tuned where no model says it."""

DEFAULT_CACHES = ("hurwitz2", "hurwitz3", "hurwitz4", "rq3")
"""2, 3 and 4 bits, and the default preset with its 16-bit segments."""
