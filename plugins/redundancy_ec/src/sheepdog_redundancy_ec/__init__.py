"""Erasure coding, Reed-Solomon d:p"""
