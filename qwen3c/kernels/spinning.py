"""How long OpenMP's threads spin before they sleep: briefly, unless the user chose.

A thread that waits for another may spin for some microseconds, then must sleep: a spinning one takes the core
its partner needs as soon as anything else runs on the machine (docs/ATTEMPTS.md has the figures). libgomp
reads its variable, GOMP_SPINCOUNT, when the engine is loaded; processes started later are not to inherit it.
"""

import os

VARIABLE, SPINS = "GOMP_SPINCOUNT", "500"
_borrowed = False


def spin_briefly() -> None:
    """Set libgomp's variable for the engine that is loaded next, unless the user has set one."""
    global _borrowed
    if not {VARIABLE, "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ[VARIABLE] = SPINS
        _borrowed = True


def give_variable_back() -> None:
    """Take the variable out of the environment again, once libgomp has read it."""
    global _borrowed
    if _borrowed:
        os.environ.pop(VARIABLE, None)
        _borrowed = False
