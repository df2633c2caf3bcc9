"""MetaSchedule records, one folder per GPU, with a manifest each."""
