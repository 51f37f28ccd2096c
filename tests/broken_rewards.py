"""A module of rewards that cannot be imported, for the tests of the process pool."""

raise RuntimeError("a library of this reward is broken")
