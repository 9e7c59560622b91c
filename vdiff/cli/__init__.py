"""The command line: ``vdiff train | sample | evaluate | list | describe | convert | inspect | summary | doctor``."""

from vdiff.cli.entry import main

__all__ = ["main"]
