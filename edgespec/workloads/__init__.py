"""Uses of the runtime that need all of it together; each stands on the commands' parts and adds no
engine.
"""
