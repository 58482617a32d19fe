"""Constrained decoding: samples spent on continuations that can still satisfy the constraint. One file a method."""

from whatmatters.core.catalog import open_room

__all__ = open_room(__name__, globals())
