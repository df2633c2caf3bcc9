"""Graph passes over Relax modules, one per file, named by what they do."""
