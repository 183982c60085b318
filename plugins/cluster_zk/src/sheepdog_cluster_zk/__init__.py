"""Cluster driver on Apache ZooKeeper"""
