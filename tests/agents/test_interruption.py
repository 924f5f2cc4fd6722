import os
import signal
import threading

import pytest

from agents.interruption import ASKING, Interruption


@pytest.fixture(autouse=True)
def usual():
    """Handlers as an interactive shell leaves them, wherever the tests run."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    assert {number: signal.getsignal(number) for number in usual} == usual
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_is_noted_and_the_block_goes_on(number):
    with Interruption() as interruption:
        assert interruption.asked is None
        os.kill(os.getpid(), number)
        assert interruption.asked == number and interruption.code == 128 + number


def test_a_second_one_ends_it_at_once():
    interruption = Interruption()

    def asked_twice():
        with interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        asked_twice()
    assert interruption.asked == signal.SIGTERM


def test_a_hang_up_that_is_ignored_stays_ignored(usual):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert interruption.asked is None
    assert signal.signal(signal.SIGHUP, usual[signal.SIGHUP]) == signal.SIG_IGN


def test_another_thread_notes_nothing(usual):
    found = []

    def work():
        with Interruption() as interruption:
            found.append((interruption.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, usual[signal.SIGTERM])]
