"""Builders of store directories, byte by byte, for tests."""
