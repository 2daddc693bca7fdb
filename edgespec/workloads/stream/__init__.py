"""A model that watches frames on a clock and speaks when it should: its clock, its score, clips to learn
from.
"""
