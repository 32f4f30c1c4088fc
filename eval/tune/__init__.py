"""Tuning to a budget: the settings (:mod:`.space`), their measurement (:mod:`.bench`), the search and its preset."""
