"""Importers: model sources to a Relax module whose attention is kept whole."""
