"""Pickles as data: an interpreter that calls nothing, and an intermediate form that can be edited and written again."""
