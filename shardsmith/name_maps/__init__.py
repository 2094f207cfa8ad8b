"""Name maps: how tensors in memory become tensors in files, and back. What a map of one's own needs is here."""

from shardsmith.name_maps.maps import NameMap, Translation, find_name_map
from shardsmith.name_maps.slices import Joined, Slice

__all__ = ["Joined", "NameMap", "Slice", "Translation", "find_name_map"]
