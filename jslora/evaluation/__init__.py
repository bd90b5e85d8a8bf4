"""A model's answers and speed, measured: beside another adapter, or with weights kept otherwise."""
