"""The core of Sheepdog, a distributed block store for virtual machines"""
