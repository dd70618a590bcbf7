"""server_soak: waiting by thirds, and where nobody disturbed it."""

from __future__ import annotations

from benchmarks.server_soak import thirds, undisturbed, waiting


def test_a_third_has_what_ended_in_it() -> None:
    measured = [(float(second), float(second % 100)) for second in range(300)]
    found = thirds(measured, 300)
    assert found == [{"count": 100, "median": 50.0, "p95": 95.0, "max": 99.0}] * 3
    assert thirds(measured[:150], 300)[1]["count"] == 50


def test_seconds_with_others_and_those_behind_them_do_not_count() -> None:
    course = {
        "memory": [(0.0, 1.0)],
        "answers_over_time": [(second + 0.5, 0.1 + (second == 12), 1.0) for second in range(30)],
        "gaps": [(second + 0.2, 0.02) for second in range(30)],
        "others": [(float(second), 0.5 if second == 10 else 0.0) for second in range(30)],
    }
    calm = undisturbed(course)
    assert [int(at) for at, *_ in calm["gaps"]] == [*range(3, 10), *range(14, 30)]
    whole, undivided = waiting(course, 30), waiting(calm, 30)
    assert whole["first_piece_s"][1]["max"] == 1.1 and undivided["first_piece_s"][1]["max"] == 0.1
    assert whole["others_processors"][1]["max"] == 0.5 and undivided["others_processors"][1]["max"] == 0.0
