"""The tests of zeco_jax; the folders mirror the package's."""
