"""Recipes and the bundled demo model: data only."""
