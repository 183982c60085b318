"""Object store with all objects in one flat directory"""
