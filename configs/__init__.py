"""Recipes, one YAML per published setting; a package of data, so that an installed aligntok finds them."""
