"""LightningDataModules. Importing the package lets configs name these classes without their module."""

from datamodules.documents import DocumentWindows
from datamodules.lifespan_shards import LifespanShards
from datamodules.online_keys import OnlineKeys
from datamodules.token_windows import TokenWindows

__all__ = ["DocumentWindows", "LifespanShards", "OnlineKeys", "TokenWindows"]
