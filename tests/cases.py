"""Cases of parametrised tests that are not run every time."""

import pytest


def slow(*case):
    """One that takes many interpreted steps."""
    return pytest.param(*case, marks=pytest.mark.slow)


def exhaustive(*case):
    """One that is near to others."""
    return pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.exhaustive])
