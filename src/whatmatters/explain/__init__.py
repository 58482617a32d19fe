"""Attribution: which parts of an input matter to an output. One file a method."""

from whatmatters.core.catalog import open_room

__all__ = open_room(__name__, globals())
