"""Data of which the demo adapters are made: the same plain facts, told in three voices."""
