"""MetaSchedule driver, log store and device identity."""
