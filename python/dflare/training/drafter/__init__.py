"""The model that trains: built from a target, run over blocks, exported for serving."""
