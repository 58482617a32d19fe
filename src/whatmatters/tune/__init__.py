"""Fine-tuning: parameters trained only where it pays. One file a method."""

from whatmatters.core.catalog import open_room

__all__ = open_room(__name__, globals())
