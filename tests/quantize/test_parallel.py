"""Threads that share the cores: order, errors, nesting."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from headrace.quantize.parallel import cores, parallel_map


def test_results_are_in_order_with_and_without_cores() -> None:
    expected = [n * n for n in range(20)]
    assert parallel_map(lambda n: n * n, range(20)) == expected
    with cores(3):
        assert parallel_map(lambda n: n * n, range(20)) == expected


def test_cores_work_at_the_same_time_and_a_worker_spreads_to_itself() -> None:
    meet = threading.Barrier(2, timeout=20)

    def outer(n: int) -> list[str]:
        meet.wait()
        return parallel_map(lambda _: threading.current_thread().name, range(3))

    with cores(2):
        names = parallel_map(outer, range(2))
    assert [len(set(some)) for some in names] == [1, 1] and names[0] != names[1]


def test_the_first_error_is_raised_and_no_thread_is_left() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), cores(2):
        parallel_map(lambda n: 1 // n, [1, 0, 2])
    assert threading.active_count() == before
    assert parallel_map(lambda n: threading.current_thread(), [0]) == [threading.main_thread()]


def test_products_do_not_depend_on_jobs() -> None:
    a = np.random.default_rng(0).standard_normal((300, 700), np.float32)
    results = []
    for jobs in (1, 2, 4):
        with cores(jobs):
            results += parallel_map(lambda _: a @ a.T, range(2))
    assert all(np.array_equal(result, results[0]) for result in results)


def test_a_blas_has_one_thread_inside_and_its_own_outside() -> None:
    def blas() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    np.ones((2, 2)) @ np.ones((2, 2))
    before = blas()
    with cores(2):
        assert set(blas()) == {1}
    assert blas() == before and before
