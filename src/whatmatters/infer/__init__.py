"""Sparse inference: channels skipped where they matter least. One file a method."""

from whatmatters.core.catalog import open_room

__all__ = open_room(__name__, globals())
