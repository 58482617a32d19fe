"""Scorers: what matters, by site or by token. One file a family; all are listed by `whatmatters methods --job score`."""

from whatmatters.core.catalog import open_room

__all__ = open_room(__name__, globals())
