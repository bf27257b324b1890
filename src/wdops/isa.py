"""The instruction set that the kernels run on: by default the best that this processor has.

Every instruction set gives the same bits; to choose one is for tests, for measuring, and for ruling it out when
something goes wrong. The environment variable `WDOPS_ISA` chooses one for a whole process.
"""

from wdops._load import native


def available() -> list[str]:
    """The names of the instruction sets that this processor runs, best first."""
    return native.available_isas()


def active() -> str:
    """The name of the one in use."""
    return native.active_isa()


def use(name: str) -> None:
    """Makes `name` the instruction set of every kernel, in all threads, from its next run on.

    Raises:
      ValueError: `name` is unknown, or this processor does not run it; then nothing changes.
    """
    native.use_isa(name)
