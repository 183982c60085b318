"""The pytest plugin that ships with core: fixtures for conformance kits."""
