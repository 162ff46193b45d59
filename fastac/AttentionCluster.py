"""The module class under its own import path.

`import fastac.AttentionCluster` makes this module an attribute of the package while the package is imported;
the package then binds the name to the class, and Python does not bind it again.
"""

from .modules import AttentionCluster

__all__ = ["AttentionCluster"]
