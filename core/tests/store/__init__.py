"""Tests of the object stores that core ships."""
