"""Without a suitable clang every test here is skipped, for one reason."""

import emulator
import pytest


@pytest.fixture(autouse=True, scope="session")
def needs_emulator():
    reason = emulator.available()
    if reason:
        pytest.skip(reason)


def pytest_terminal_summary(terminalreporter):
    reason = emulator.available()
    if reason:
        terminalreporter.write_line(f"skipped: {reason}")
