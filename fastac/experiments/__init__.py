"""The papers' experiments, to be run again (install ``fastac[train]``)."""
