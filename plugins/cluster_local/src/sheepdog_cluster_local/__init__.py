"""Cluster driver for several sheep on one host"""
