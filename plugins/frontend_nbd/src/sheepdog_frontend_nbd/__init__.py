"""Serves volumes over the Network Block Device protocol"""
