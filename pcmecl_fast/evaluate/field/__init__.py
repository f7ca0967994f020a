"""Edited clips measured as the field does: clips and their labels from names, pairs, measures of a clip, tables."""
