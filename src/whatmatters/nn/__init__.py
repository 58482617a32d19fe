"""Layers and parametrizations, as torch modules. One file a method."""

from whatmatters.core.catalog import open_room

__all__ = open_room(__name__, globals())
