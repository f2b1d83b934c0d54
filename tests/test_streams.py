"""Callbacks of a program: both kinds, their errors, their end. (Sockets and deadlines: tests/test_http_server.py.)"""

import asyncio

import pytest

from dvai_bridge import CALLBACKS_LIMIT, Notifier, call_back, close_body, pour


def test_a_callback_may_be_of_either_kind():
    async def double(number):
        return 2 * number

    async def run():
        return await call_back(double, 2), await call_back(lambda number: 2 * number, 3)

    assert asyncio.run(run()) == (4, 6)


def test_ordinary_functions_are_told_at_once_and_coroutines_by_the_end(caplog):
    told = []

    async def tell_later(word):
        await asyncio.sleep(0)
        told.append(word)

    async def fail(word):
        raise ValueError(word)

    async def run():
        notifier = Notifier()
        notifier.tell(tell_later, "later")
        notifier.tell(told.append, "now")
        assert told == ["now"]
        notifier.tell(lambda word: 1 / 0, "ordinary")
        notifier.tell(fail, "coroutine")
        await notifier.close()
        await notifier.close()
        assert told == ["now", "later"] and asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert caplog.text.count("a callback failed") == 2


def test_callbacks_that_never_return_are_bounded_and_end(monkeypatch, caplog):
    monkeypatch.setattr("dvai_bridge.CALLBACK_END_S", 0.05)
    begun = []

    async def hang():
        begun.append(1)
        await asyncio.Event().wait()

    async def run():
        notifier = Notifier()
        for _ in range(CALLBACKS_LIMIT + 3):
            notifier.tell(hang)
        await notifier.close()
        assert len(begun) == CALLBACKS_LIMIT and asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert caplog.text.count("a callback is left out") == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_program_is_no_error_of_a_callback(error):
    def end():
        raise error

    async def run():
        Notifier().tell(end)

    with pytest.raises(error):
        asyncio.run(run())


class Sink:
    """Takes what is poured, and is full after so many pieces until it was drained."""

    def __init__(self, room):
        self.room, self.left, self.taken = room, room, []

    @property
    def is_full(self):
        return self.left <= 0

    def write(self, data):
        self.taken.append(data)
        self.left -= 1

    send = write

    def flush(self):
        pass

    async def drain(self):
        self.left = self.room


def test_a_body_is_poured_piece_by_piece_or_by_its_own_way():
    async def give():
        for piece in (b"a", b"", b"b"):
            yield piece

    class Body:
        async def pour_into(self, sink):
            sink.write(b"at once")

    async def run():
        plain, own = Sink(1), Sink(1)
        await pour(give(), plain)
        await pour(Body(), own)
        assert plain.taken == [b"a", b"b"] and own.taken == [b"at once"]
        await close_body(b"")
        await close_body(Body())

    asyncio.run(run())
