"""Command lines of Sheepdog: the daemon sheep and the admin tool dog"""
