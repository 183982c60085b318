"""Cluster driver with embedded Raft"""
