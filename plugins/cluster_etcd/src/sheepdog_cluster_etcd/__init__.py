"""Cluster driver on etcd"""
