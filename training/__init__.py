"""Training of the reference models that ship with the package. Not part of the package itself."""
