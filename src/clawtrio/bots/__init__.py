"""Bots for chat networks, each a module that runs: ``python -m clawtrio.bots.<name>``.

They use the public names of :mod:`clawtrio` only: models for bots of one's own.
"""
