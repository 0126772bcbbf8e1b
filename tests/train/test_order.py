"""The order of training as facts about its rows, and Grain's threads."""

import threading
import time

import numpy as np
import pytest

from falcon_jax.errors import ConfigError
from falcon_jax.train.order import RowOrder, batches
from falcon_jax.train.shards import Tokens


def in_pieces(num_tokens: int) -> Tokens:
    """0, 1, 2, ... in pieces of different sizes."""
    return Tokens(np.split(np.arange(num_tokens, dtype=np.uint16), [1, num_tokens // 7, num_tokens // 2]))


def test_an_epoch_trains_on_each_token_once() -> None:
    order = RowOrder(in_pieces(1000), length=8, seed=3)
    assert order.num_windows == 125
    for epoch in range(3):
        assert sorted(order.rows(125 * epoch, 125)[:, 1:].ravel()) == list(range(1000))


def test_rows_hold_a_stretch_of_the_tokens_taken_as_a_ring() -> None:
    rows = RowOrder(in_pieces(50), length=9).rows(0, 30)
    assert rows.shape == (30, 10) and rows.dtype == np.uint16
    np.testing.assert_array_equal(rows, (rows[:, :1] + np.arange(10)) % 50)


def test_rows_depend_on_seed_and_number_alone() -> None:
    order, again = (RowOrder(in_pieces(1000), 16, seed=7) for _ in range(2))
    rows = order.rows(0, 300)  # almost five epochs
    for first, num_rows in [(299, 1), (61, 3), (0, 1), (120, 180), (62, 62), (5, 0)]:
        np.testing.assert_array_equal(again.rows(first, num_rows), rows[first : first + num_rows])
    assert not np.array_equal(RowOrder(in_pieces(1000), 16, seed=8).rows(0, 62), rows[:62])


def test_rows_stay_what_they_are_in_a_new_version() -> None:
    """A run that began before an upgrade, of Grain or of this package, goes on with its own rows after it."""
    order = RowOrder(in_pieces(1000), 16, seed=7)
    assert order.starts(60, 6).tolist() == [881, 233, 171, 491, 763, 459]


def test_cuts_and_order_are_others_in_each_epoch() -> None:
    order = RowOrder(in_pieces(1000), 16)
    first, second = order.starts(0, 62), order.starts(62, 62)
    assert set(first % 16) != set(second % 16)
    assert not np.array_equal((first - first[0]) % 1000 // 16, (second - second[0]) % 1000 // 16)


def test_processes_that_ask_for_their_rows_cover_each_once_while_the_batch_grows() -> None:
    whole = RowOrder(in_pieces(1000), 16).rows(0, 4 + 8 + 16)
    first, seen = 0, []
    for num_rows in (4, 8, 16):
        share = num_rows // 4
        seen += [RowOrder(in_pieces(1000), 16).rows(first + process * share, share) for process in range(4)]
        first += num_rows
    np.testing.assert_array_equal(np.concatenate(seen), whole)


def test_billions_of_windows_are_ordered_without_a_list_of_them() -> None:
    tokens = Tokens([np.broadcast_to(np.uint16(3), (3 * 10**12,))])
    order = RowOrder(tokens, length=512)
    assert order.num_windows > 2**32
    starts = order.starts(order.num_windows - 3000, 3000)
    assert len(set(starts)) == 3000 and len(set(starts % 512)) <= 2  # 2: the ring's length is no multiple of 512
    assert starts.min() < 1e11 and starts.max() > 2.9e12
    assert (order.rows(5 * 10**9, 2) == 3).all()


@pytest.mark.parametrize(("length", "seed", "message"), [(16, 0, "only 10 tokens"), (4, -1, "seed is -1")])
def test_what_has_no_order_is_refused(length: int, seed: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RowOrder(in_pieces(10), length, seed)


def test_batches_come_in_order_from_any_step_and_errors_come_to_the_reader() -> None:
    def make(step: int) -> int:
        if step == 10**9 + 20:
            raise KeyError("no twenty")
        time.sleep(step % 3 / 1000)  # they are not done in their order
        return step

    with batches(make, 10**9) as reading:
        for step in range(10**9, 10**9 + 20):
            assert next(reading) == step
        with pytest.raises(KeyError, match="no twenty"):
            next(reading)


def test_leaving_the_batches_ends_their_threads_and_makes_no_more() -> None:
    made = []
    with batches(lambda step: made.append(step) or step, 0, num_ahead=3) as reading:
        next(reading)
        workers = [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]
        assert workers
    for thread in workers:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert max(made) <= 3
