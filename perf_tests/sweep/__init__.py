"""Levels x workloads x versions over every GPU there is."""
