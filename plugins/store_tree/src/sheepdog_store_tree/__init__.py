"""Object store with objects in sub-directories by volume"""
