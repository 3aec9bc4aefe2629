"""Checkpoints of other projects on disk: what they hold, read without those projects.

Nothing in a file is run, and no name in a file leads out of its folder.
"""
