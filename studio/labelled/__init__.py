"""Labelled pictures, for every domain with classes: sources, splits, and how well a classifier does on them."""
